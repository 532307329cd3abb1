"""The gather GEMM by rows, by blocks and in parts, against Σ_k w_k g[i_k]ᵀ x[i_k] in float64."""

from dataclasses import replace

import pytest
import torch

from memaop_triton.kernels.gpu import launch
from memaop_triton.kernels.gpu.gather_gemm import gather_gemm
from memaop_triton.kernels.gpu.residual_gemm import residual_gemm
from tests.judging import (
    LAYOUTS,
    SMALL,
    check_products,
    drawn_blocks,
    drawn_rows,
    operands,
    outer_products,
)
from tests.pairwise import pairwise

DTYPES = (torch.float16, torch.float32)
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


@pytest.mark.parametrize(("shape", "config", "kind"), pairwise(SHAPES, CONFIGS, KINDS))
def test_shapes(shape, config, kind):
    dtype, weighted = kind
    rows, n, p, k = shape
    x, g = operands(rows, n, p, dtype)
    indices = drawn_rows(rows, k, torch.int32 if weighted else torch.int64)
    weights = 4 * torch.rand(k) if weighted else None
    result = gather_gemm(x, g, indices, weights, config=CONFIGS[config])
    assert result.dtype == dtype
    check_products(result, x, g, indices, weights)


@pytest.mark.parametrize("config", [SMALL, CONFIGS["columns-first"], CONFIGS["two-tiles"]])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", [(33, 17), (48, 32)], ids=["odd", "even"])
def test_strides(layout, columns, config):
    x, g = operands(50, *columns, torch.float16, layout)
    indices = drawn_rows(50, 37)
    check_products(gather_gemm(x, g, indices, config=config), x, g, indices)


def test_operands_of_different_strides():
    x, _ = operands(50, 33, 17, torch.float32, "transposed")
    _, g = operands(50, 33, 17, torch.float32, "strided")
    indices = drawn_rows(50, 37)
    check_products(gather_gemm(x, g, indices, config=SMALL), x, g, indices)


@pytest.mark.parametrize("by_descriptor", [False, True])
def test_one_row_repeated(by_descriptor, request):
    if by_descriptor:
        request.getfixturevalue("tensor_copies")
    x = torch.randn(1, 32).half().expand(40, 32)
    g = torch.randn(1, 16).half().expand(40, 16)
    indices = drawn_blocks([0, 2], 16)
    check_products(gather_gemm(x, g, indices, block_rows=16, config=SMALL), x, g, indices)


def test_rows_that_are_not_selected_are_not_read():
    x, g = operands(40, 33, 17, torch.float32)
    indices = drawn_rows(40, 21)
    others = torch.ones(40, dtype=torch.bool).index_fill(0, indices, False)
    x[others], g[others] = torch.nan, torch.inf
    check_products(gather_gemm(x, g, indices, config=SMALL), x, g, indices)


@pytest.mark.parametrize(
    ("config", "block_rows", "by_descriptor"),
    [(name, 1, False) for name in CONFIGS]
    + [("three-parts", 16, False), ("three-parts", 16, True), ("chosen", 64, True)],
)
def test_padding_is_not_read(config, block_rows, by_descriptor, request, traffic):
    if by_descriptor:
        request.getfixturevalue("tensor_copies")
    x, g = operands(70 * block_rows - 5, 48, 32, torch.float16)
    indices = drawn_blocks(sorted(torch.randperm(70)[:45].tolist()), block_rows)
    weights = (1 + torch.rand(45)).where(torch.rand(45) < 0.6, 0).repeat_interleave(block_rows)
    unused = torch.ones(len(x), dtype=torch.bool)
    unused[indices[(weights > 0) & (indices < len(x))]] = False
    x[unused], g[unused] = torch.nan, torch.inf
    result = gather_gemm(
        x, g, indices, weights, block_rows=block_rows, is_padded=True, config=CONFIGS[config]
    )
    drawn = weights > 0
    check_products(result, x, g, indices[drawn], weights[drawn])
    read = traffic[0].read
    name = "desc" if by_descriptor else "ptr"
    wanted = int((~unused).sum())
    assert (read[f"x_{name}"], read[f"g_{name}"]) == (2 * 48 * wanted, 2 * 32 * wanted)


@pytest.mark.parametrize("ratio", [1, 4, 8, 100, 1000])
@pytest.mark.parametrize("by_descriptor", [False, True])
def test_weights_leave_float16_its_range(ratio, by_descriptor, request):
    """Rows may be as large as the range allows, or by a root less if weights differ or are huge."""
    if by_descriptor:
        request.getfixturevalue("tensor_copies")
    x, g = operands(64, 48, 32, torch.float16)
    x, g = (x / 1e4).half(), (g / g.abs().max() * 6e4).half()
    indices = torch.arange(64)
    alike = torch.full((64,), float(ratio))
    unlike = torch.linspace(1, ratio, 4).repeat_interleave(16)
    less = (g / ratio**0.5).half()
    for weights, large in ((alike, g if ratio <= 64 else less), (unlike, less)):
        result = gather_gemm(x, large, indices, weights, block_rows=16, config=SMALL)
        exact = outer_products(x.double(), large.double(), indices, weights.double())
        torch.testing.assert_close(
            result.double(), exact, rtol=0, atol=2e-3 * exact.abs().max().item()
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("largest", [1e-3, 1.0, 3000.0, 1e6])
@pytest.mark.parametrize("split", [1, 2])
def test_range_of_weights(dtype, largest, split):
    """Large weights of small rows: Σ fits float16 although some w_k hardly do."""
    x, g = operands(60, 33, 17, dtype)
    indices = drawn_rows(60, 45)
    weights = largest * torch.rand(45)
    weights[0] = largest
    g /= max(1.0, largest)
    config = replace(SMALL, split_k=split)
    result = gather_gemm(x, g, indices, weights, config=config, out=torch.empty(17, 33))
    exact = outer_products(x.double(), g.double(), indices, weights)
    torch.testing.assert_close(
        result.double(), exact, rtol=0, atol=2 * torch.finfo(dtype).eps * exact.abs().max().item()
    )


@pytest.mark.parametrize("named", [True, False], ids=["named", "left-out"])
@pytest.mark.parametrize("by_descriptor", [False, True], ids=["pointers", "descriptors"])
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
def test_blocks(rows, block_rows, blocks, by_descriptor, named, request, traffic):
    if by_descriptor:
        request.getfixturevalue("tensor_copies")
    x, g = operands(rows, 40, 24, torch.float16)
    indices = drawn_blocks(blocks, block_rows)
    weights = torch.rand(len(blocks)).repeat_interleave(block_rows)
    if not named:
        inside = indices < rows
        indices, weights = indices[inside], weights[inside]
    for w, split in ((None, 1), (weights, 2)):
        config = replace(SMALL, block_k=32, split_k=split)
        result = gather_gemm(x, g, indices, w, block_rows=block_rows, config=config)
        check_products(result, x, g, indices, w)
    kernel = "block_gemm_kernel" if by_descriptor else "gather_gemm_kernel"
    assert traffic[0].kernel == kernel


@pytest.mark.parametrize("columns", [(33, 16), (32, 17)])
def test_blocks_that_no_descriptor_can_describe(columns, tensor_copies, traffic):
    x, g = operands(64, *columns, torch.float16)
    indices = drawn_blocks([1, 3], 16)
    result = gather_gemm(x, g, indices, block_rows=16, config=SMALL)
    check_products(result, x, g, indices)
    assert traffic[0].kernel == "gather_gemm_kernel"


@pytest.mark.parametrize("split", [1, 2, 3])
@pytest.mark.parametrize("by_descriptor", [False, True], ids=["pointers", "descriptors"])
def test_into_a_tensor_of_another_dtype(split, by_descriptor, request):
    if by_descriptor:
        request.getfixturevalue("tensor_copies")
    x, g = operands(80, 48, 32, torch.float16)
    indices, out = drawn_blocks([0, 1, 4], 16), torch.full((32, 48), torch.nan)
    config = replace(SMALL, split_k=split)
    assert gather_gemm(x, g, indices, block_rows=16, out=out, config=config) is out
    check_products(out, x, g, indices)


@pytest.mark.parametrize(
    ("rank", "way", "kind"),
    pairwise(
        [1, 5, 16, 17, 64],
        [(1, 1), (3, 1), (2, 2)],
        [(torch.float16, False), (torch.float16, True), (torch.float32, False)],
    ),
)
def test_correction(rank, way, kind, request):
    (split, tiles), (dtype, by_descriptor) = way, kind
    if by_descriptor:
        request.getfixturevalue("tensor_copies")
    x, g = operands(70, 40, 24, dtype)
    c, e = torch.randn(24, rank), torch.randn(40, rank).to(dtype)
    indices = drawn_blocks([0, 2, 4], 16)
    weights = (8 * torch.rand(3)).repeat_interleave(16) if split > 1 else None
    result = gather_gemm(
        x, g, indices, weights, block_rows=16, correction=(c, e), out=torch.empty(24, 40),
        config=replace(SMALL, split_k=split, tiles_n=tiles),
    )  # fmt: skip
    check_products(result, x, g, indices, weights, plus=c.double() @ e.double().T)


def test_a_correction_alone():
    c, e = torch.randn(17, 5), torch.randn(33, 5)
    x, g = operands(10, 33, 17, torch.float32)
    none = torch.empty(0, dtype=torch.int64)
    result = gather_gemm(x, g, none, correction=(c, e), config=replace(SMALL, split_k=2))
    torch.testing.assert_close(result, c @ e.T)


@pytest.mark.parametrize(("n", "p"), [(48, 17), (33, 32), (40, 8)])
def test_alignment_is_promised_only_where_it_holds(n, p, monkeypatch):
    """A false promise changes no value here: it would misalign the copies of a GPU."""
    seen, run = [], launch.launch

    def recording(*args, **kwargs):
        seen.append(kwargs)
        run(*args, **kwargs)

    monkeypatch.setattr(launch, "launch", recording)
    x, g = operands(20, n, p, torch.float16)
    memory = (torch.zeros(20, n), torch.zeros(20, p), torch.zeros(20, dtype=torch.bool))
    indices, number = drawn_rows(20, 9), torch.zeros(1)
    gather_gemm(x, g, indices, config=SMALL)
    residual_gemm(memory, x, g, indices, number, number.long(), number, config=SMALL)
    assert len(seen) == 2
    for constants in seen:
        assert (constants["EVEN_N"], constants["EVEN_P"]) == (n % 16 == 0, p % 16 == 0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_the_result(bad):
    x, g = operands(40, 33, 17, torch.float32)
    x[20, 3] = bad
    result = gather_gemm(x, g, torch.arange(40), config=SMALL)
    assert not result[:, 3].isfinite().any()
    assert result[:, :3].isfinite().all()
    assert result[:, 4:].isfinite().all()
