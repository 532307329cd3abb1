"""The fused residual GEMM: against its formula in float64, and against update and GEMM apart."""

from dataclasses import replace

import pytest
import torch

from memaop_triton.kernels.gpu.gather_gemm import gather_gemm
from memaop_triton.kernels.gpu.residual_gemm import residual_gemm
from memaop_triton.kernels.gpu.score import accumulate_and_score, accumulate_rest
from memaop_triton.kernels.tuning.config import RowConfig
from tests.judging import LAYOUTS, SMALL, as_good_as, drawn_blocks, operands, outer_products
from tests.pairwise import pairwise

CARRY, SEED = torch.tensor([0.75]), torch.tensor([987654321])
TILE = RowConfig(16, 32, 4)
CONFIGS = {"whole": SMALL, "split": replace(SMALL, split_k=3), "chosen": None}
# M, N, P, K
SHAPES = [(1, 1, 1, 1), (17, 3, 1, 17), (50, 33, 17, 20), (100, 16, 48, 64), (129, 17, 32, 129)]


def new_memory(rows, n, p, dtype):
    """Every other slot is filled; the empty ones hold NaN."""
    filled = torch.arange(rows) % 2 == 0
    halves = operands(rows, n, p, dtype, "padded")
    for half in halves:
        half[~filled] = torch.nan
    return (*halves, filled)


def signs_of(rows):
    """What an update that adds nothing makes of ones."""
    memory = (torch.ones(rows, 1), torch.ones(rows, 1), torch.ones(rows, dtype=torch.bool))
    zeros = torch.zeros(rows, 1)
    accumulate_and_score(memory, zeros, zeros, torch.ones(1), SEED, signed=True, config=TILE)
    return memory[0]


def formed(memory, x, g, signed, dtype):
    """X̂ and Ĝ, each element rounded to the dtype of X as the kernel's operands are."""
    factor = (CARRY * signs_of(x.shape[0]) if signed else CARRY).to(dtype)
    return [
        (torch.where(memory[2][:, None], factor * m.to(dtype), 0.0) + a.to(dtype))
        for m, a in zip(memory, (x, g), strict=False)
    ]


def check(result, memory, x, g, indices, signed):
    exact = outer_products(*formed(memory, x, g, signed, torch.float64), indices)
    rounded = [a.to(x.dtype) for a in formed(memory, x, g, signed, torch.float32)]
    as_good_as(result, outer_products(*rounded, indices, dtype=x.dtype), exact)


def some_rows(rows, count):
    return torch.randperm(rows)[:count].sort().values


@pytest.mark.parametrize(
    ("shape", "config", "dtype"), pairwise(SHAPES, CONFIGS, [torch.float16, torch.float32])
)
def test_shapes(shape, config, dtype):
    (rows, n, p, k), signed = shape, config != "whole"
    x, g = operands(rows, n, p, dtype)
    memory = new_memory(rows, n, p, torch.float32 if signed else dtype)
    before = [m.clone() for m in memory]
    indices = some_rows(rows, k).to(torch.int32 if signed else torch.int64)
    result = residual_gemm(
        memory, x, g, indices, CARRY, SEED, torch.zeros(1), signed=signed, config=CONFIGS[config]
    )
    assert result.dtype == dtype
    check(result, memory, x, g, indices, signed)
    for m, old in zip(memory, before, strict=True):
        torch.testing.assert_close(m, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", [(33, 17), (32, 48)], ids=["odd", "even"])
def test_strides(layout, columns):
    x, g = operands(40, *columns, torch.float32, layout)
    memory, indices = new_memory(40, *columns, torch.float32), some_rows(40, 27)
    result = residual_gemm(memory, x, g, indices, CARRY, SEED, torch.zeros(1), config=SMALL)
    check(result, memory, x, g, indices, signed=False)


@pytest.mark.parametrize(
    ("rows", "block_rows", "blocks", "split"),
    [
        (70, 16, [1, 4], 1),
        (70, 32, [0, 2], 2),
        (5, 16, [0], 1),
        (140, 128, [1], 1),
        (64, 64, [0], 2),
    ],
)
def test_blocks(rows, block_rows, blocks, split):
    x, g = operands(rows, 33, 17, torch.float32)
    memory, indices = new_memory(rows, 33, 17, torch.float32), drawn_blocks(blocks, block_rows)
    result = residual_gemm(
        memory, x, g, indices, CARRY, SEED, torch.zeros(1),
        signed=True, block_rows=block_rows, config=replace(SMALL, split_k=split),
    )  # fmt: skip
    check(result, memory, x, g, indices, signed=True)


def test_no_rows():
    x, g = operands(10, 33, 17, torch.float32)
    memory, none = new_memory(10, 33, 17, torch.float32), torch.empty(0, dtype=torch.int64)
    for config in CONFIGS.values():
        result = residual_gemm(memory, x, g, none, CARRY, SEED, torch.zeros(1), config=config)
        assert torch.equal(result, torch.zeros(17, 33))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_lost_row_is_everywhere_in_the_result(config):
    x, g = operands(40, 33, 17, torch.float16)
    memory, lost = new_memory(40, 33, 17, torch.float16), torch.full((1,), torch.nan)
    result = residual_gemm(memory, x, g, some_rows(40, 27), CARRY, SEED, lost, config=config)
    assert result.isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("row", [0, 39])
def test_what_is_not_finite_reaches_the_result(bad, row):
    x, g = operands(40, 33, 17, torch.float32)
    x[row, 3] = bad
    memory = new_memory(40, 33, 17, torch.float32)
    result = residual_gemm(memory, x, g, torch.arange(40), CARRY, SEED, torch.zeros(1))
    assert not result[:, 3].isfinite().any()
    assert result[:, :3].isfinite().all()
    assert result[:, 4:].isfinite().all()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bias_grad", [False, True])
def test_a_step_equals_update_and_gemm_apart(signed, bias_grad):
    """Three steps on with the same rows: dW, db, the memory and its flags agree."""
    rows, n, p = 60, 33, 17
    apart = new_memory(rows, n, p, torch.float32)
    fused = tuple(m.clone() for m in apart)
    options = {"signed": signed, "bias_grad": bias_grad, "config": TILE}
    for step in range(3):
        x, g = operands(rows, n, p, torch.float32)
        indices, seed = some_rows(rows, 21), SEED + step
        taken = torch.zeros(rows, dtype=torch.bool).index_fill(0, indices, True)

        _, sums = accumulate_and_score(apart, x, g, CARRY, seed, **options)
        right = gather_gemm(*apart[:2], indices, config=SMALL)
        apart[2][indices] = False

        lost = torch.zeros(1)
        rest_sums = accumulate_rest(fused, x, g, CARRY, seed, taken, lost, **options)
        result = residual_gemm(fused, x, g, indices, CARRY, seed, lost, signed=signed, config=SMALL)
        fused[2][indices] = False

        torch.testing.assert_close(result, right)
        assert torch.equal(fused[2], apart[2])
        for one, other in zip(fused[:2], apart[:2], strict=True):
            torch.testing.assert_close(one[~taken], other[~taken])
        assert (sums is None and rest_sums is None) or torch.equal(sums, rest_sums)
