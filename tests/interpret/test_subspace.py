"""The subspace memory's products, against their formulas in float64."""

import contextlib
import math
from dataclasses import replace

import pytest
import torch

from memaop_triton.kernels.gpu import launch, subspace
from memaop_triton.kernels.gpu.gather_gemm import gather_gemm
from memaop_triton.kernels.tuning.config import RowConfig
from tests.judging import LAYOUTS, SMALL, as_good_as, drawn_blocks, drawn_rows, laid_out, operands
from tests.pairwise import pairwise

TILE = RowConfig(16, 32, 4)
DTYPES = (torch.float16, torch.float32)
# M, N, q
SHAPES = [(1, 1, 1), (17, 3, 2), (3, 129, 16), (129, 33, 17), (40, 64, 5), (20, 80, 64)]


def new_basis(columns, rank, dtype):
    """Q with orthonormal columns, and s."""
    q = torch.linalg.qr(torch.randn(columns, rank)).Q
    return q.contiguous().to(dtype), float(2 ** round(math.log2(columns) / 2))


def exact_projection(x, q, scale):
    """Z and the norms of the rest in float64, where Z itself is rounded as it is stored."""
    z = x.double() @ q.double() / scale
    stored = scale * z.to(x.dtype).double()
    left = x.double().square().sum(1) - stored.square().sum(1)
    return z, left.clamp(min=0).sqrt()


def check_rest(rest, exact, x):
    """√(a − b): judged as a − b against what float32 leaves of a."""
    squares = x.double().square().sum(1)
    error = (rest.double().square() - exact.square()).abs()
    assert (error <= 4 * torch.finfo(x.dtype).eps * squares).all()


@pytest.mark.parametrize("config", [TILE, RowConfig(16, 16, 4), None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_projection(shape, dtype, config):
    rows, columns, rank = shape
    (x, _), (q, scale) = operands(rows, columns, 1, dtype), new_basis(columns, rank, dtype)
    z, rest = subspace.project(x, q, scale, config=config)
    exact_z, exact_rest = exact_projection(x, q, scale)
    assert z.dtype == dtype
    as_good_as(z, (x @ q) / scale, exact_z)
    assert not rest.isnan().any()
    check_rest(rest, exact_rest, x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", [33, 64])
def test_projection_of_strided_rows(layout, columns):
    x, _ = operands(20, columns, 1, torch.float32, layout)
    q, scale = new_basis(columns, 5, torch.float32)
    z, rest = subspace.project(x, q, scale, config=TILE)
    exact_z, exact_rest = exact_projection(x, q, scale)
    as_good_as(z, (x @ q) / scale, exact_z)
    check_rest(rest, exact_rest, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rest_of_special_rows(dtype):
    (x, _), (q, scale) = operands(9, 40, 1, dtype), new_basis(40, 5, dtype)
    x[1] = 0.0
    x[2:4] = (torch.randn(2, 5) @ q.T.float()).to(dtype)
    x[4, 3], x[5, 39], x[6, 0] = torch.nan, torch.inf, -torch.inf
    _, rest = subspace.project(x, q, scale, config=TILE)
    norms = torch.linalg.vector_norm(x.float(), dim=1)
    assert rest[1] == 0
    assert (rest[2:4] > 0).all(), "a row must keep a chance to be drawn"
    assert (rest[2:4] <= 4 * torch.finfo(dtype).eps ** 0.5 * norms[2:4]).all()
    assert not rest[4:7].isfinite().any()
    assert (rest[[0, 7, 8]] > 0.5 * norms[[0, 7, 8]]).all()


@pytest.mark.parametrize(
    ("dtype", "allowed", "formed", "epsilon"),
    [
        (torch.float32, "highest", "ieee", 2**-23),
        (torch.float32, "high", "tf32", 2**-10),
        (torch.float16, "high", "ieee", 2**-10),
        (torch.bfloat16, "high", "ieee", 2**-7),
    ],
)
def test_the_rest_drowns_in_the_rounding_of_its_product(
    dtype, allowed, formed, epsilon, tensor_copies, monkeypatch
):
    """The least rest that is stored is that of the precision that Z is computed in."""
    given = []
    monkeypatch.setattr(launch, "launch", lambda *args, **kwargs: given.append(kwargs))
    with float32_products(allowed):
        subspace.project(torch.ones(8, 32, dtype=dtype), torch.ones(32, 4, dtype=dtype), 4.0)
    (launched,) = given
    assert (launched["PRECISION"], launched["epsilon"]) == (formed, epsilon)


@contextlib.contextmanager
def float32_products(allowed):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("split", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias_grad", [False, True])
def test_gradient(shape, dtype, split, bias_grad):
    rows, columns, rank = shape
    g, z = operands(rows, columns, rank, dtype)
    rest = torch.rand(rows)
    parts, scores, sums = subspace.project_gradient(
        g, z, rest, bias_grad=bias_grad, config=replace(TILE, split=split)
    )
    assert parts.shape == (split, columns, rank)
    as_good_as(parts.sum(0), g.T.float() @ z.float(), g.T.double() @ z.double())
    norms = [torch.linalg.vector_norm(a, dim=1) for a in (g.float(), g.double())]
    as_good_as(scores, rest * norms[0], rest.double() * norms[1])
    if bias_grad:
        assert sums.dtype == dtype
        as_good_as(sums, g.sum(0), g.double().sum(0))
    else:
        assert sums is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", [33, 64])
def test_gradient_of_strided_rows(layout, columns):
    g, z = operands(20, columns, 5, torch.float32)
    parts, scores, sums = subspace.project_gradient(
        laid_out(g, layout), z, torch.ones(20), bias_grad=True, config=replace(TILE, split=2)
    )
    as_good_as(parts.sum(0), g.T @ z, g.T.double() @ z.double())
    as_good_as(scores, g.norm(dim=1), g.double().norm(dim=1))
    as_good_as(sums, g.sum(0), g.double().sum(0))


def test_scores_of_rows_that_are_not_finite():
    g, z = operands(20, 40, 5, torch.float32)
    rest = torch.ones(20)
    g[3, 39], g[4, 0], rest[5], rest[6] = torch.nan, torch.inf, torch.nan, torch.inf
    g[7], rest[7] = 0.0, torch.inf
    _, scores, _ = subspace.project_gradient(g, z, rest, config=TILE)
    assert torch.equal((scores == torch.inf).nonzero()[:, 0], torch.arange(3, 8))
    assert scores[[0, 1, 2]].isfinite().all()


@pytest.mark.parametrize("config", [TILE, replace(TILE, split=3), None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_transposed_product(shape, dtype, config):
    rows, columns, rank = shape
    a, z = operands(rows, columns, rank, dtype)
    result = subspace.transposed_mm(z, a, config=config)
    assert result.dtype == torch.float32
    as_good_as(result, a.T.float() @ z.float(), a.T.double() @ z.double())


@pytest.mark.parametrize(
    ("rank", "way", "dtype"),
    pairwise([1, 8, 17, 64], [(1, False), (1, True), (2, False), (2, True)], DTYPES),
)
def test_correction(rank, way, dtype, request):
    split, by_descriptor = way
    if by_descriptor:
        request.getfixturevalue("tensor_copies")
    g, z = operands(70, 24, rank, dtype)
    parts = torch.randn(3, 24, rank)
    indices = drawn_blocks([0, 2, 4], 16)
    weights = (1 + torch.rand(3)).to(dtype).float().repeat_interleave(16)
    config = replace(SMALL, block_n=16, split_k=split)
    for w in (None, weights):
        result = subspace.correction(parts, z, g, indices, w, block_rows=16, config=config)
        inside = indices[indices < 70]
        left = g[inside] if w is None else g[inside] * w[: len(inside), None].to(dtype)
        exact = parts.double().sum(0) - left.double().T @ z[inside].double()
        as_good_as(result, parts.sum(0) - left.float().T @ z[inside].float(), exact)


@pytest.mark.parametrize("count", [80, 30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_gradient(dtype, count):
    """(GᵀZ) Qᵀ + Σ w gᵀ(x − z Qᵀ), which is Gᵀ X itself with every row at weight 1."""
    (x, g), (q, scale) = operands(80, 40, 24, dtype), new_basis(40, 8, dtype)
    indices = drawn_rows(80, count)
    weights = torch.ones(80) if count == 80 else 2.0 ** torch.randint(0, 3, (count,))
    z, rest = subspace.project(x, q, scale, config=TILE)
    parts = subspace.project_gradient(g, z, rest, config=replace(TILE, split=2)).parts
    c = subspace.correction(parts, z, g, indices, weights, config=SMALL)
    e = (scale * q.float()).to(dtype)
    result = gather_gemm(
        x, g, indices, weights, correction=(c, e), config=SMALL, out=torch.empty(24, 40)
    )
    wx, wg, wz, we = (a.double() for a in (x, g, z, e))
    left = wg[indices] * weights[:, None].double()
    exact = wg.T @ wz @ we.T + left.T @ (wx - wz @ we.T)[indices]
    if count == 80:
        torch.testing.assert_close(exact, wg.T @ wx)
    bound = 2**-15 if dtype == torch.float16 else 2**-18
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=bound * exact.abs().max())
