"""The gather GEMM as compiled: values in every dtype, bounds, races between parts, far rows."""

from dataclasses import replace

import pytest
import torch

from memaop_triton.kernels.gpu.gather_gemm import gather_gemm
from tests.judging import (
    SMALL,
    check_products,
    drawn_blocks,
    drawn_rows,
    operands,
    outer_products,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FIRST = 1 << 14
one_gpu = pytest.mark.parametrize("gpu", [80], indirect=True, ids=["sm_80"])


@one_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "config"),
    [
        ((1, 1, 1, 1), SMALL),
        ((70, 33, 17, 50), replace(SMALL, tiles_n=2, split_k=2)),
        ((70, 48, 32, 64), replace(SMALL, x_columns_first=True, split_k=3)),
    ],
)
def test_values(shape, config, dtype):
    rows, n, p, k = shape
    x, g = operands(rows, n, p, dtype, device="cuda")
    indices = drawn_rows(rows, k, torch.int32 if n == 48 else torch.int64, device="cuda")
    check_products(gather_gemm(x, g, indices, config=config), x, g, indices)
    weights = 6 * torch.rand(k, device="cuda")
    check_products(gather_gemm(x, g, indices, weights, config=config), x, g, indices, weights)


@one_gpu
@pytest.mark.parametrize("layout", ["transposed", "padded"])
def test_strides(layout):
    x, g = operands(50, 33, 32, torch.bfloat16, layout, device="cuda")
    indices = drawn_rows(50, 37, device="cuda")
    check_products(gather_gemm(x, g, indices, config=SMALL), x, g, indices)


@one_gpu
def test_no_rows():
    x, g = operands(5, 33, 17, torch.bfloat16, device="cuda")
    none = torch.empty(0, dtype=torch.int64, device="cuda")
    assert (gather_gemm(x, g, none, config=replace(SMALL, split_k=2)) == 0).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("rows", "block_rows", "blocks", "split"),
    [(70, 16, [1, 3, 4], 2), (70, 64, [1], 1), (100, 32, [0, 3], 3), (5, 16, [0], 1)],
)
def test_blocks(rows, block_rows, blocks, split, weighted):
    x, g = operands(rows, 40, 24, torch.bfloat16, device="cuda")
    indices = drawn_blocks(blocks, block_rows, device="cuda")
    weights = None
    if weighted:
        weights = (4 * torch.rand(len(blocks), device="cuda")).repeat_interleave(block_rows)
    config = replace(SMALL, block_k=32, split_k=split)
    result = gather_gemm(x, g, indices, weights, block_rows=block_rows, config=config)
    check_products(result, x, g, indices, weights)


@pytest.mark.parametrize("block_rows", [1, 16])
def test_padding_is_not_read(block_rows):
    x, g = operands(20 * block_rows - 1, 40, 24, torch.bfloat16, device="cuda")
    indices = drawn_blocks(list(range(1, 20)), block_rows, device="cuda")
    weights = 4 * torch.rand(19, device="cuda")
    weights[::3] = 0
    weights = weights.repeat_interleave(block_rows)
    drawn = (weights > 0) & (indices < len(x))
    unused = torch.ones(len(x), dtype=torch.bool, device="cuda").index_fill(0, indices[drawn], 0)
    x[unused], g[unused] = torch.nan, torch.inf
    config = replace(SMALL, split_k=2)
    result = gather_gemm(
        x, g, indices, weights, block_rows=block_rows, is_padded=True, config=config
    )
    check_products(result, x, g, indices[drawn], weights[drawn])


@pytest.mark.parametrize("dtype", DTYPES)
def test_correction(dtype):
    x, g = operands(70, 40, 24, dtype, device="cuda")
    c, e = torch.randn(24, 17, device="cuda"), torch.randn(40, 17, device="cuda").to(dtype)
    indices = drawn_blocks([0, 2, 4], 16, device="cuda")
    weights = (8 * torch.rand(3, device="cuda")).repeat_interleave(16)
    result = gather_gemm(
        x, g, indices, weights, block_rows=16, correction=(c, e), config=replace(SMALL, split_k=2),
        out=torch.empty(24, 40, device="cuda"),
    )  # fmt: skip
    check_products(result, x, g, indices, weights, plus=c.double() @ e.double().T)


@pytest.mark.parametrize("block_rows", [1, 16])
def test_precision_of_float32(block_rows):
    """tf32 keeps ten bits of each operand, "ieee" all."""
    x, g = operands(64, 40, 24, torch.float32, device="cuda")
    indices = drawn_blocks([0, 2, 3], 16, device="cuda")
    exact = outer_products(x.double(), g.double(), indices)
    bound = outer_products(x.double().abs(), g.double().abs(), indices)
    options = {"block_rows": block_rows, "config": SMALL}
    errors = {
        name: (gather_gemm(x, g, indices, input_precision=name, **options) - exact).abs()
        for name in ("tf32", "ieee")
    }
    assert (errors["tf32"] <= 2**-9 * bound).all()
    assert errors["tf32"].max() > 1e-4
    assert (errors["ieee"] <= 2**-20 * bound).all()


def wide(far, rows, columns):
    """Rows whose numbers start at FIRST, with a stride of 2¹⁸ elements."""
    near = torch.empty_strided((rows, columns), (1 << 18, 1), device="cuda", dtype=torch.bfloat16)
    near.copy_(torch.randn(rows, columns))
    return near, far(near, FIRST)


@pytest.mark.parametrize("block_rows", [1, 16])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_beyond_32_bits(block_rows, dtype, far):
    (near_x, x), (near_g, g) = wide(far, 24, 40), wide(far, 24, 24)
    indices = drawn_blocks([0, 1], 16, device="cuda").to(dtype)[: 32 if block_rows > 1 else 20]
    result = gather_gemm(x, g, indices + FIRST, block_rows=block_rows, config=SMALL)
    check_products(result, near_x, near_g, indices)


@one_gpu
def test_columns_of_unit_stride_beside_rows_beyond_32_bits(far):
    """A stride of 1 is a constant to the compiler, whatever the other operand's is."""
    near_g, g = wide(far, 24, 24)
    near_x = torch.randn(40, 24, device="cuda").bfloat16().mT
    x = far(near_x, FIRST)
    indices = drawn_rows(24, 20, device="cuda")
    result = gather_gemm(x, g, indices + FIRST, config=SMALL)
    check_products(result, near_x, near_g, indices)
