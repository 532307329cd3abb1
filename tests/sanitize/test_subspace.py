"""The subspace memory's products as compiled: values in every dtype, bounds, races, tf32."""

from dataclasses import replace

import pytest
import torch

from memaop_triton.kernels.gpu import subspace
from memaop_triton.kernels.gpu.gather_gemm import gather_gemm
from memaop_triton.kernels.tuning.defaults import RowConfig
from tests.judging import SMALL, as_good_as, drawn_rows, operands

pytestmark = pytest.mark.parametrize("gpu", [80], indirect=True, ids=["sm_80"])
TILE = RowConfig(16, 32, 4)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def new_basis(columns, rank, dtype):
    q = torch.linalg.qr(torch.randn(columns, rank, device="cuda")).Q
    return q.contiguous().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((1, 1, 1), "plain"), ((37, 33, 5), "padded"), ((37, 64, 17), "transposed")],
)
def test_projection(shape, layout, dtype):
    rows, columns, rank = shape
    x, _ = operands(rows, columns, 1, dtype, layout, device="cuda")
    q = new_basis(columns, rank, dtype)
    z, rest = subspace.project(x, q, 4.0, config=TILE)
    exact = x.double() @ q.double() / 4
    as_good_as(z, (x @ q) / 4, exact)
    squares = x.double().square().sum(1)
    left = squares - (4 * exact.to(dtype).double()).square().sum(1)
    error = (rest.double().square() - left.clamp(min=0)).abs()
    assert (error <= 4 * torch.finfo(dtype).eps * squares).all()


def test_rest_of_special_rows():
    x, q = torch.randn(9, 40, device="cuda").bfloat16(), new_basis(40, 5, torch.bfloat16)
    x[1], x[2] = 0.0, q[:, 0]
    x[4, 3], x[5, 39], x[6, 0] = torch.nan, torch.inf, -torch.inf
    _, rest = subspace.project(x, q, 4.0, config=TILE)
    assert rest[1] == 0
    assert 0 < rest[2] < 0.3
    assert not rest[4:7].isfinite().any()
    assert rest[[0, 3, 7, 8]].isfinite().all()


@pytest.mark.parametrize("bias_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((1, 1, 1), "plain"), ((53, 33, 5), "padded"), ((53, 64, 17), "transposed")],
)
def test_gradient(shape, layout, dtype, bias_grad):
    rows, columns, rank = shape
    g, _ = operands(rows, columns, 1, dtype, layout, device="cuda")
    z, rest = torch.randn(rows, rank, device="cuda").to(dtype), torch.rand(rows, device="cuda")
    parts, scores, sums = subspace.project_gradient(
        g, z, rest, bias_grad=bias_grad, config=replace(TILE, split=3)
    )
    as_good_as(parts.sum(0), g.T.float() @ z.float(), g.T.double() @ z.double())
    lengths = [torch.linalg.vector_norm(a, dim=1) for a in (g.float(), g.double())]
    as_good_as(scores, rest * lengths[0], rest.double() * lengths[1])
    if bias_grad:
        as_good_as(sums, g.sum(0), g.double().sum(0))
    as_good_as(
        subspace.transposed_mm(z, g, config=replace(TILE, split=2)),
        g.T.float() @ z.float(),
        g.T.double() @ z.double(),
    )


def test_scores_of_rows_that_are_not_finite():
    g, rest = torch.randn(20, 40, device="cuda").bfloat16(), torch.ones(20, device="cuda")
    g[3, 39], g[4, 0], rest[5], rest[6] = torch.nan, torch.inf, torch.nan, torch.inf
    g[7], rest[7] = 0.0, torch.inf
    z = torch.randn(20, 5, device="cuda").bfloat16()
    _, scores, _ = subspace.project_gradient(g, z, rest, config=TILE)
    assert torch.equal(scores == torch.inf, (torch.arange(20) >= 3) & (torch.arange(20) < 8))
    assert scores[:3].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_gradient(dtype):
    x, g = operands(70, 40, 24, dtype, device="cuda")
    q, indices = new_basis(40, 8, dtype), drawn_rows(70, 30, device="cuda")
    weights = 2.0 ** torch.randint(0, 3, (30,), device="cuda")  # exact products with any dtype
    z, rest = subspace.project(x, q, 4.0, config=TILE)
    parts = subspace.project_gradient(g, z, rest, config=replace(TILE, split=2)).parts
    c = subspace.correction(parts, z, g, indices, weights, config=replace(SMALL, split_k=2))
    e = (4 * q.float()).to(dtype)
    result = gather_gemm(
        x, g, indices, weights, correction=(c, e), config=replace(SMALL, split_k=2),
        out=torch.empty(24, 40, device="cuda"),
    )  # fmt: skip
    wx, wg, wz, we = (a.double() for a in (x, g, z, e))
    left = wg[indices] * weights[:, None].double()
    exact = wg.T @ wz @ we.T + left.T @ (wx - wz @ we.T)[indices]
    # C is carried by two summands of the dtype: twice its bits.
    bound = {torch.bfloat16: 2**-12, torch.float16: 2**-15, torch.float32: 2**-18}[dtype]
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=bound * exact.abs().max())


def test_tf32_when_torch_allows_it():
    x, q = torch.randn(20, 40, device="cuda"), new_basis(40, 5, torch.float32)
    exact, before = x.double() @ q.double(), torch.get_float32_matmul_precision()
    errors = {}
    try:
        for allowed in ("highest", "high"):
            torch.set_float32_matmul_precision(allowed)
            z, _ = subspace.project(x, q, 1.0, config=TILE)
            errors[allowed] = (z - exact).abs().max().item()
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors["highest"] < 1e-6
    assert 1e-5 < errors["high"] < 1e-2
