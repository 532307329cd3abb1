"""One weight-gradient call: dense, ours, the literature's methods, and the limit of each family."""

import pytest
import torch

from memaop_triton.bench.suites import contenders
from memaop_triton.bench.suites.problem import Problem, on_problems

SQUARE, WIDE = contenders.WANTED_SHAPES
QUICK = [
    Problem(*SQUARE, ratio=1 / 8),
    Problem(*SQUARE, ratio=1 / 16),
    Problem(4096, 768, 3072, ratio=1 / 8),
]
MORE = [
    Problem(*WIDE, ratio=1 / 8),
    Problem(*WIDE, ratio=1 / 16),
    Problem(4096, 768, 3072, ratio=1 / 16),
    Problem(16384, 512, 512, ratio=1 / 8),
    Problem(2048, 512, 512, ratio=1 / 8, dtype=torch.float64),
    Problem(2048, 512, 512, ratio=1 / 8, dtype=torch.bfloat16),
    Problem(*SQUARE, ratio=1 / 8, block_rows=64),
]
ON_GPU = [
    Problem(*shape, ratio=ratio, dtype=dtype, device="cuda", block_rows=block_rows)
    for shape in ((16384, 4096, 4096), (16384, 1024, 1024), (8192, 4096, 11008), (4096, 768, 3072))
    for ratio in (1 / 8, 1 / 16)
    for dtype, block_rows in ((torch.bfloat16, 1), (torch.bfloat16, 64), (torch.float32, 1))
]
SMOKE = [Problem(64, 32, 16, ratio=1 / 8)]


@pytest.mark.parametrize("memory", contenders.FAMILIES)
@on_problems((("quick", "cpu"), QUICK), (("cpu",), MORE), (("gpu",), ON_GPU), (("smoke",), SMOKE))
def test_dw(compare, problem, memory):
    names = {"none": "no memory", "residual": "row memory", "subspace": "subspace"}
    wanted = contenders.wanted(problem)
    compare(
        problem,
        "dw",
        f"dW {problem.details}, {names[memory]}",
        contenders.family(problem, memory),
        cold=bool(wanted),
        wanted=wanted,
    )
