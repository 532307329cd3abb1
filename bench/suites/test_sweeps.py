"""How the time of a weight-gradient call goes with M, K/M and the width, and what a call costs."""

import torch

from memaop_triton.bench.suites import contenders
from memaop_triton.bench.suites.problem import Problem, on_problems

NAMES = ("default", "priority", "topk-residual")
WITH_PEER = (*NAMES, "vcas")
ROWS = [2**e for e in range(10, 18)]
RATIOS = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64]
WIDTHS = [64, 128, 256, 512, 1024, 2048]


def gpu(m, n, p, ratio=1 / 8):
    return Problem(m, n, p, ratio, torch.bfloat16, "cuda")


@on_problems(
    (("quick",), [Problem(m, 256, 256) for m in ROWS]),
    (("cpu",), [Problem(m, 512, 512) for m in ROWS]),
    (("gpu",), [gpu(m, 2048, 2048) for m in ROWS[1:]]),
    (("smoke",), [Problem(m, 32, 32) for m in (64, 256)]),
)
def test_rows(compare, problem):
    title = f"M = {problem.m}, N = P = {problem.n}"
    compare(problem, "sweep_rows", title, contenders.selected(problem, NAMES))


@on_problems(
    (("quick",), [Problem(4096, 1024, 1024, r) for r in RATIOS[:5]]),
    (("cpu",), [Problem(8192, width, width, r) for width in (256, 1024) for r in RATIOS]),
    (("cpu",), [Problem(1024, width, width, r) for width in (256, 1024) for r in RATIOS[:5]]),
    (("gpu",), [gpu(16384, width, width, r) for width in (1024, 4096) for r in RATIOS]),
    (("smoke",), [Problem(128, 32, 32, 1 / 4)]),
)
def test_ratio(compare, problem):
    compare(problem, "sweep_ratio", problem.details, contenders.selected(problem, WITH_PEER))


@on_problems(
    (("quick", "cpu"), [Problem(4096, width, width) for width in WIDTHS[1:5]]),
    (("cpu",), [Problem(4096, width, width) for width in (WIDTHS[0], WIDTHS[5])]),
    (("cpu",), [Problem(512, width, width) for width in WIDTHS]),
    (("gpu",), [gpu(16384, width, width) for width in (256, 512, 1024, 2048, 4096, 8192)]),
    (("smoke",), [Problem(128, width, width) for width in (16, 32)]),
)
def test_width(compare, problem):
    title = f"N = P = {problem.n}, M = {problem.m}"
    compare(problem, "sweep_width", title, contenders.selected(problem, WITH_PEER))


@on_problems(
    (("quick", "cpu", "smoke"), [Problem(64, 64, 64)]),
    (("gpu",), [gpu(64, 64, 64)]),
)
def test_overhead(compare, problem):
    """Fixed costs, with hardly any arithmetic: M = N = P = 64."""
    title = f"overhead of a call, {problem.shape}"
    names = ("default", "priority", "topk", "topk-residual", *contenders.SAMPLERS)
    compare(problem, "overhead", title, contenders.selected(problem, names))
