"""The first run on a GPU: everything that can be learnt in ten minutes, and nothing lost.

    make gpu                                 in an environment of its own
    make gpu PYTHON=python3 VENV=none        in an image without network; RESULTS=dir says where to
    make gpu-dry                             the same on the CPU, on small shapes, interpreted

It imports torch, triton, numpy and pytest only. `stages` has the stages and their time limits;
`running` starts each as processes of their own, ends them at the limit, and starts them again
behind a case that broke the GPU; `smoke`, `gpu_tests`, `times` and `tuning` are their cases;
`records` keeps what they found, a line of JSON per case, written before the next one begins;
`page` makes a page of it.
"""
