"""The gather GEMM by rows, by blocks and in parts, against Σ_k w_k g[i_k]ᵀ x[i_k] in float64."""

from dataclasses import replace

import pytest
import torch

from memaop_triton.bench.suites.plain_gemm import plain_gemm
from memaop_triton.kernels.gpu import launch
from memaop_triton.kernels.gpu.gather_gemm import Correction, gather_gemm
from tests.judging import (
    LAYOUTS,
    SMALL,
    check_products,
    drawn_blocks,
    drawn_rows,
    operands,
    outer_products,
)
from tests.kernel_checks import check_blocks, check_gather, check_gather_correction, check_padding
from tests.pairwise import pairwise

# M, N, P, K
SHAPES = [
    (1, 1, 1, 1),
    (3, 1, 17, 3),
    (17, 3, 1, 1),
    (129, 17, 33, 129),
    (129, 48, 32, 37),
    (40, 129, 17, 64),
    (100, 16, 16, 16),
    (5, 3, 3, 0),
]
CONFIGS = {
    "rows-first": SMALL,
    "columns-first": replace(SMALL, x_columns_first=True),
    "two-tiles": replace(SMALL, tiles_n=2, split_k=2),
    "three-parts": replace(SMALL, split_k=3),
    "chosen": None,
}
KINDS = [(torch.float16, False), (torch.float16, True), (torch.float32, True)]


@pytest.mark.parametrize(
    ("shape", "config", "kind", "layout"), pairwise(SHAPES, CONFIGS, KINDS, LAYOUTS)
)
def test_shapes(shape, config, kind, layout):
    dtype, weighted = kind
    index = torch.int32 if weighted else torch.int64
    check_gather(shape, dtype, layout, index=index, weighted=weighted, config=CONFIGS[config])


def test_operands_of_different_strides(by_descriptor):
    one_row = torch.randn(1, 32).half().expand(40, 32)
    turned, _ = operands(40, 32, 1, torch.float16, "transposed")
    _, apart = operands(40, 1, 16, torch.float16, "strided")
    indices = drawn_blocks([0, 2], 16)
    for x, g in ((one_row, one_row[:, :16]), (turned, apart)):
        check_products(gather_gemm(x, g, indices, block_rows=16, config=SMALL), x, g, indices)


@pytest.mark.parametrize(
    ("config", "block_rows", "by_descriptor"),
    [(name, 1, False) for name in CONFIGS]
    + [("three-parts", 16, False), ("three-parts", 16, True), ("chosen", 64, True)],
    indirect=["by_descriptor"],
)
def test_padding_is_not_read(config, block_rows, by_descriptor, traffic):
    wanted = check_padding(70, block_rows, torch.float16, CONFIGS[config])
    read = traffic[1].read  # after the scale of the weights
    name = "desc" if by_descriptor else "ptr"
    assert (read[f"x_{name}"], read[f"g_{name}"]) == (2 * 48 * wanted, 2 * 32 * wanted)


@pytest.mark.parametrize("ratio", [1e-3, 1.0, 4.0, 8.0, 100.0, 1e6])
@pytest.mark.usefixtures("by_descriptor")
def test_weights_leave_float16_its_range(ratio):
    """Rows may be as large as the range allows, or by a root less if weights differ or are huge."""
    x, g = operands(64, 48, 32, torch.float16)
    x, g = (x / 1e4).half(), (g / g.abs().max() * 6e4).half()
    indices = torch.arange(64)
    alike = torch.full((64,), ratio)
    unlike = torch.linspace(1, ratio, 4).repeat_interleave(16)
    less = (g / max(1, ratio) ** 0.5).half()
    for weights, large in ((alike, g if ratio <= 64 else less), (unlike, less)):
        for split in (1, 2):
            config, out = replace(SMALL, split_k=split), torch.empty(32, 48)
            gather_gemm(x, large, indices, weights, block_rows=16, config=config, out=out)
            exact = outer_products(x.double(), large.double(), indices, weights.double())
            error = (out.double() - exact).abs().max()
            assert error <= 2e-3 * exact.abs().max()


@pytest.mark.parametrize("is_named", [True, False], ids=["named", "left-out"])
@pytest.mark.parametrize(
    ("rows", "block_rows", "blocks"),
    [
        (64, 16, [0, 1, 2, 3]),
        (70, 16, [1, 4]),
        (70, 32, [0, 2]),
        (65, 64, [1]),
        (200, 128, [0, 1]),
        (5, 16, [0]),
    ],
)
def test_blocks(rows, block_rows, blocks, by_descriptor, is_named, traffic):
    for weighted, split in ((False, 1), (True, 2)):
        check_blocks(
            rows, block_rows, blocks, torch.float16,
            weighted=weighted, split=split, is_named=is_named,
        )  # fmt: skip
    kernel = "block_gemm_kernel" if by_descriptor else "gather_gemm_kernel"
    assert traffic[0].kernel == kernel


@pytest.mark.parametrize("columns", [(33, 16), (32, 17)])
def test_blocks_that_no_descriptor_can_describe(columns, tensor_copies, traffic):
    x, g = operands(64, *columns, torch.float16)
    indices = drawn_blocks([1, 3], 16)
    check_products(gather_gemm(x, g, indices, block_rows=16, config=SMALL), x, g, indices)
    assert traffic[0].kernel == "gather_gemm_kernel"


@pytest.mark.parametrize(
    ("rank", "way", "dtype", "by_descriptor"),
    pairwise(
        [1, 5, 16, 17, 64],
        [(1, 1), (3, 1), (2, 2)],
        [torch.float16, torch.float32],
        [False, True],
    ),
    indirect=["by_descriptor"],
)
def test_correction(rank, way, dtype, by_descriptor):
    split, tiles = way
    config = replace(SMALL, split_k=split, tiles_n=tiles)
    check_gather_correction(rank, dtype, weighted=split > 1, config=config)


def test_a_correction_alone():
    c, e = torch.randn(17, 5), torch.randn(33, 5)
    x, g = operands(10, 33, 17, torch.float32)
    none = torch.empty(0, dtype=torch.int64)
    correction = Correction(c, e, 2.0)
    result = gather_gemm(x, g, none, correction=correction, config=replace(SMALL, split_k=2))
    torch.testing.assert_close(result, 2 * c @ e.T)


@pytest.mark.parametrize(("n", "p"), [(48, 17), (33, 32), (40, 8)])
def test_alignment_is_promised_only_where_it_holds(n, p, monkeypatch):
    """A false promise changes no value here: it would misalign the copies of a GPU."""
    seen = []
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, **given: seen.append(given))
    x, g = operands(20, n, p, torch.float16)
    gather_gemm(x, g, drawn_rows(20, 9), config=SMALL)
    promised = [(constants["EVEN_N"], constants["EVEN_P"]) for constants in seen]
    assert promised == [(n % 16 == 0, p % 16 == 0)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(32, 32, 32), (37, 17, 33)])
def test_the_plain_gemm_that_gathering_is_compared_with(shape, weighted, dtype):
    rows, n, p = shape
    x, g = operands(rows, n, p, dtype)
    weights = torch.rand(rows) if weighted else None
    check_products(plain_gemm(g, x, weights, config=SMALL), x, g, torch.arange(rows), weights)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("row", [0, 39])
def test_what_is_not_finite_reaches_the_result(bad, row):
    x, g = operands(40, 33, 17, torch.float32)
    x[row, 3] = bad
    result = gather_gemm(x, g, torch.arange(40))
    assert not result[:, 3].isfinite().any()
    assert result[:, :3].isfinite().all()
    assert result[:, 4:].isfinite().all()
