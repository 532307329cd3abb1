"""Processes that write to one cache: `python -m tests.kernels.tuning.cache_worker tune|kill`.

`tune` forks two that tune fifty shapes each, `kill` forks one after another and kills each at a
random point of its writing. The folder is `$MEMAOP_TRITON_CACHE_DIR`; the timing is pretended, and
nothing but the heuristic's choice is timed, so that most of the time is spent on the file.
"""

import os
import random
import select
import signal
import statistics
import sys
import time

import torch

from memaop_triton.kernels.targets import TARGETS
from memaop_triton.kernels.tuning import cache, search, tuner
from memaop_triton.kernels.tuning.config import GemmConfig, Problem
from memaop_triton.kernels.tuning.defaults import heuristic

GPU = cache.Gpu("Fake GPU (1)", "9.0", 132)
KERNEL = "gather_gemm"
PATH = cache.path_of(cache.folder(), GPU, KERNEL)
SHAPES, KILLS = 50, 100


def problem(number):
    return Problem(KERNEL, torch.float16, 4096, 512, 16 * (number + 1), 64)


def tune(process):
    """Tune the shapes of this process, those of the other lie between them."""
    for number in range(process, 2 * SHAPES, 2):
        tuner.choose(problem(number), torch.device("cpu"), lambda: lambda config: None, GemmConfig)
        tuner.forget()  # what it wrote before is not written again: a race would lose it


def write():
    shape = problem(random.randrange(SHAPES))
    entry = cache.entry_for(shape, heuristic(shape, TARGETS["sm_90"]), 1.0, 2.0)
    cache.merge_into(PATH, cache.ConfigFile(GPU, KERNEL, (entry,)))


def write_constantly(started):
    random.seed()
    while True:
        os.write(started, b".")
        write()


def seconds_of_a_write():
    times = []
    for _ in range(9):
        began = time.monotonic()
        write()
        times.append(time.monotonic() - began)
    return statistics.median(times)


def fork(work, *args):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work(*args)
            code = 0
        finally:
            os._exit(code)
    return child


def two_at_once():
    children = [fork(tune, process) for process in range(2)]
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)


def kill_at_random_points():
    most, usual = 0, seconds_of_a_write()
    ready, started = os.pipe()
    for _ in range(KILLS):
        child = fork(write_constantly, started)
        os.read(ready, 1)
        time.sleep(random.uniform(0, 2 * usual))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while select.select([ready], [], [], 0)[0]:
            os.read(ready, 4096)
        file = cache.read(PATH)  # raises if it cannot be read
        held = 0 if file is None else len(file.entries)
        assert held >= most, "entries were lost"
        most = held
    cache.merge_into(PATH, cache.ConfigFile(GPU, KERNEL, ()))
    left = sorted(path.name for path in PATH.parent.iterdir())
    assert left == [PATH.name, f"{PATH.name}.lock"], left
    print(most)


if __name__ == "__main__":
    cache.gpu_of = lambda device: GPU
    search.candidates = lambda problem, target: ()
    tuner.time_candidate = lambda call, device, best: random.uniform(0.1, 1.0)
    {"tune": two_at_once, "kill": kill_at_random_points}[sys.argv[1]]()
