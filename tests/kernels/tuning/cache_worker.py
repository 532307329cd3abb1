"""Processes that write to one cache, in the folder `$MEMAOP_TRITON_CACHE_DIR`.

Two at once add entries of their own; then one after another is killed while it writes.
"""

import itertools
import multiprocessing
import random
import time

import torch

from memaop_triton.kernels.tuning import cache
from memaop_triton.kernels.tuning.config import GemmConfig, Problem

GPU = cache.Gpu("Fake GPU (1)", "sm_90", 132)
KERNEL = "gather_gemm"
PATH = cache.path_of(cache.folder(), GPU, KERNEL)
SHAPES, KILLS = 60, 30


def write(numbers):
    for number in numbers:
        problem = Problem(KERNEL, torch.float16, 4096, 512, 16 * (number + 1), 64)
        cache.forget()  # what it wrote before is not written again: a race would lose it
        cache.add(GPU, KERNEL, cache.entry_for(problem, GemmConfig(64, 64, 64, 4, 3), 1.0, 2.0))


def start(numbers):
    child = multiprocessing.get_context("fork").Process(target=write, args=(numbers,))
    child.start()
    return child


def held():
    return {entry.problem for entry in cache.read(PATH).entries}  # raises if it cannot be read


def two_at_once():
    children = [start(range(first, SHAPES, 2)) for first in range(2)]
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert len(held()) == SHAPES


def kill_at_random_points():
    for _ in range(KILLS):
        child = start(itertools.cycle(range(SHAPES)))
        time.sleep(random.uniform(0.002, 0.02))
        child.kill()
        child.join()
        assert len(held()) == SHAPES
    write([0])
    left = sorted(path.name for path in PATH.parent.iterdir())
    assert left == [PATH.name, f"{PATH.name}.lock"], left


if __name__ == "__main__":
    cache.LOCK_SECONDS = 300.0  # a machine with other work may leave a writer waiting
    two_at_once()
    kill_at_random_points()
