"""The fused residual GEMM as compiled: values in every dtype, bounds, races between its parts."""

from dataclasses import replace

import pytest
import torch

from memaop_triton.kernels.gpu.gather_gemm import gather_gemm
from memaop_triton.kernels.gpu.residual_gemm import residual_gemm
from memaop_triton.kernels.gpu.score import accumulate_and_score, accumulate_rest
from memaop_triton.kernels.tuning.config import RowConfig
from tests.judging import SMALL, as_good_as, drawn_blocks, operands, outer_products

pytestmark = pytest.mark.parametrize("gpu", [80], indirect=True, ids=["sm_80"])
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILE = RowConfig(16, 32, 4)
FIRST = 1 << 14


def scalar(value, dtype=torch.float32):
    return torch.tensor([value], dtype=dtype, device="cuda")


def new_memory(rows, n, p, dtype, layout="padded"):
    filled = torch.arange(rows, device="cuda") % 2 == 0
    halves = operands(rows, n, p, dtype, layout, device="cuda")
    for half in halves:
        half[~filled] = torch.nan
    return (*halves, filled)


def formed(memory, x, g, dtype):
    return [
        torch.where(memory[2][:, None], 0.75 * m.to(dtype), 0.0) + a.to(dtype)
        for m, a in zip(memory, (x, g), strict=False)
    ]


def check(result, memory, x, g, indices):
    exact = outer_products(*formed(memory, x, g, torch.float64), indices)
    rounded = [a.to(x.dtype) for a in formed(memory, x, g, torch.float32)]
    as_good_as(result, outer_products(*rounded, indices, dtype=x.dtype), exact)


@pytest.mark.parametrize("layout", ["plain", "transposed", "padded"])
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype, split, layout):
    x, g = operands(61, 33, 32, dtype, layout, device="cuda")
    memory = new_memory(61, 33, 32, torch.float32 if layout == "padded" else dtype, layout="plain")
    indices = torch.randperm(61, device="cuda")[:50].sort().values
    result = residual_gemm(
        memory, x, g, indices, scalar(0.75), scalar(3, torch.int64), scalar(0.0),
        config=replace(SMALL, split_k=split),
    )  # fmt: skip
    check(result, memory, x, g, indices)


@pytest.mark.parametrize(("rows", "block_rows", "blocks"), [(70, 16, [1, 4]), (5, 32, [0])])
def test_blocks(rows, block_rows, blocks):
    x, g = operands(rows, 33, 17, torch.bfloat16, device="cuda")
    memory = new_memory(rows, 33, 17, torch.bfloat16)
    indices = drawn_blocks(blocks, block_rows, device="cuda")
    result = residual_gemm(
        memory, x, g, indices, scalar(0.75), scalar(3, torch.int64), scalar(0.0),
        block_rows=block_rows, config=replace(SMALL, split_k=2),
    )  # fmt: skip
    check(result, memory, x, g, indices)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_signs_are_those_of_the_update(dtype):
    x, g = operands(40, 33, 17, torch.float32, device="cuda")
    apart = new_memory(40, 33, 17, torch.float32)
    fused = tuple(m.clone() for m in apart)
    carry, seed, lost = scalar(0.75), scalar(1 << 40, torch.int64), scalar(0.0)
    indices = torch.arange(0, 40, 2, device="cuda").to(dtype)
    taken = torch.arange(40, device="cuda") % 2 == 0
    accumulate_and_score(apart, x, g, carry, seed, signed=True, config=TILE)
    accumulate_rest(fused, x, g, carry, seed, taken, lost, signed=True, config=TILE)
    result = residual_gemm(
        fused, x, g, indices, carry, seed, lost, signed=True, config=replace(SMALL, split_k=2)
    )
    torch.testing.assert_close(result, gather_gemm(*apart[:2], indices, config=SMALL))
    for one, other in zip(fused[:2], apart[:2], strict=True):
        torch.testing.assert_close(one[~taken], other[~taken])


@pytest.mark.parametrize("split", [1, 2])
def test_lost(split):
    x, g = operands(40, 33, 17, torch.bfloat16, device="cuda")
    result = residual_gemm(
        new_memory(40, 33, 17, torch.bfloat16), x, g, torch.arange(20, device="cuda"),
        scalar(0.75), scalar(3, torch.int64), scalar(torch.nan),
        config=replace(SMALL, split_k=split),
    )  # fmt: skip
    assert result.isnan().all()


@pytest.mark.parametrize("wide", ["operands", "memory"])
def test_rows_beyond_32_bits(wide, far):
    def rows_of(columns, stride):
        near = torch.empty_strided((24, columns), (stride, 1), device="cuda")
        return near.copy_(torch.randn(24, columns)), far(near, FIRST)

    strides = (1 << 18, 64) if wide == "operands" else (64, 1 << 18)
    (near_x, x), (near_g, g) = rows_of(33, strides[0]), rows_of(17, strides[0])
    (near_mx, mx), (near_mg, mg) = rows_of(33, strides[1]), rows_of(17, strides[1])
    filled = torch.ones(FIRST + 24, dtype=torch.bool, device="cuda")
    indices = torch.arange(20, device="cuda")
    result = residual_gemm(
        (mx, mg, filled), x, g, indices + FIRST, scalar(0.75), scalar(3, torch.int64), scalar(0.0),
        config=SMALL,
    )  # fmt: skip
    check(result, (near_mx, near_mg, filled[:24]), near_x, near_g, indices)
