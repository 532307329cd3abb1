"""Forward and backward of one linear layer."""

import torch

from memaop_triton.bench.suites import contenders
from memaop_triton.bench.suites.problem import Problem, on_problems

VARIANTS = [
    ("default", "exact"),
    ("priority", "exact"),
    ("default", "sampled"),
    ("priority", "sampled"),
    ("topk-residual", "exact"),
    ("default", "projected"),
]
WANTED_ON = [Problem(8192, 1024, 1024)]
MORE = [Problem(4096, 2048, 2048), Problem(4096, 768, 3072)]
ON_GPU = [
    Problem(*shape, dtype=torch.bfloat16, device="cuda")
    for shape in ((16384, 4096, 4096), (16384, 1024, 1024))
]


@on_problems(
    (("quick", "cpu"), WANTED_ON),
    (("cpu",), MORE),
    (("gpu",), ON_GPU),
    (("smoke",), [Problem(64, 32, 16)]),
)
def test_layer(compare, problem):
    methods = contenders.layers(problem, VARIANTS)
    wanted = {}
    if problem in WANTED_ON:
        wanted = {m.name: 1.9 if "sampled" in m.name else 1.3 for m in methods[1:5]}
    compare(problem, "layer", f"layer {problem.details}", methods, wanted=wanted)
