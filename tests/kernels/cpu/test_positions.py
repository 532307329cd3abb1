"""Passes of the C code over maps, and products of rows that are put together from pieces."""

import pytest
import torch
from torch.testing import assert_close

from memaop_triton.kernels.cpu import library, native, positions, torch_ops
from memaop_triton.kernels.cpu.picked import Picked

pytestmark = pytest.mark.skipif(
    not library.is_compiled(), reason="needs the C code: a C compiler on Linux"
)
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1, 1), (2, 64, 300), (40, 33, 129)])
def test_norms_of_positions(dtype, shape):
    maps = torch.randn(shape).to(dtype)
    found = positions.position_norms(maps)
    exact = torch.linalg.vector_norm(maps.double(), dim=1).flatten()
    assert found.dtype == torch_ops.score_dtype(dtype)
    assert_close(found.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_channels_of_some_positions(dtype, threads, monkeypatch):
    monkeypatch.setattr(positions, "threads_for", lambda *_: threads)
    maps = torch.randn(6, 17, 23).to(dtype)
    for count in (1, 50, 138):
        indices = torch.randperm(6 * 23)[:count].sort().values
        found = positions.gather_positions(maps, indices)
        assert torch.equal(found, maps.movedim(1, -1).reshape(-1, 17)[indices])


def test_maps_that_are_not_contiguous_are_left_to_pytorch():
    maps = torch.randn(2, 5, 7).movedim(1, -1)
    assert positions.position_norms(maps) is None
    assert positions.gather_positions(maps, torch.tensor([0])) is None
    assert positions.project_positions(maps, torch.eye(7, 2), 1.0) is None
    assert positions.lay_out(torch.randn(2, 5, 7, 3).mT, (0, 0)) is None
    assert positions.lay_out(torch.randn(2, 5, 7).half(), (0,)) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["channels first", "channels last"])
@pytest.mark.parametrize(
    ("shape", "padding", "groups"),
    [
        ((3, 5, 7, 9), (1, 2), 1),
        ((2, 64, 28, 28), (1, 1), 2),
        ((2, 18, 30), (0,), 3),
        ((2, 6, 3, 4, 5), (1, 0, 2), 2),
        ((1, 33, 300), (3,), 1),
    ],
)
def test_maps_are_laid_out_by_position(shape, padding, groups, order, dtype, monkeypatch):
    maps = torch.randn(shape).to(dtype)
    if order == "channels last":
        maps = maps.movedim(1, -1).contiguous().movedim(-1, 1)
    around = [pad for pad in reversed(padding) for _ in range(2)]
    expected = torch.nn.functional.pad(maps, around).movedim(1, -1)
    for threads in (1, 2):
        monkeypatch.setattr(positions, "threads_for", lambda *_, count=threads: count)
        laid_out, squares = positions.lay_out(maps, padding, groups)
        assert torch.equal(laid_out, expected)
        assert squares.dtype == torch_ops.score_dtype(dtype)
        exact = expected.double().unflatten(-1, (groups, -1)).square().sum(-1)
        assert_close(squares.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "rank"), [((3, 5, 7), 3), ((2, 128, 784), 16), ((2, 100, 131), 37), ((1, 64, 1), 64)]
)
def test_positions_are_projected_like_rows(shape, rank, dtype, monkeypatch):
    maps = torch.randn(shape).to(dtype)
    rows = maps.movedim(1, -1).reshape(-1, shape[1])
    basis = torch.linalg.qr(torch.randn(shape[1], rank)).Q.to(dtype)
    fine = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 1e-2}[dtype]
    for threads in (1, 2):
        monkeypatch.setattr(positions, "threads_for", lambda *_, count=threads: count)
        z, left = positions.project_positions(maps, basis, 0.5)
        assert z.dtype == dtype
        assert left.dtype == torch_ops.score_dtype(dtype)
        exact = rows.double() @ basis.double()
        assert_close(z.double(), exact, rtol=fine, atol=4 * fine)
        whole, inside = rows.double().square().sum(1), (0.5 * exact).square().sum(1)
        assert_close(left.double(), (whole - inside).sqrt(), rtol=1e-4, atol=1e-4)


def test_what_a_basis_leaves_of_a_position_is_rounding_and_never_nothing():
    basis = torch.linalg.qr(torch.randn(32, 4)).Q
    maps = (basis @ torch.randn(4, 50)).unsqueeze(0)
    whole = torch.linalg.vector_norm(maps[0], dim=0)
    _, left = positions.project_positions(maps, basis, 1.0)
    assert (left >= 0.99 * torch.finfo().eps ** 0.5 * whole).all()
    maps[0, 3, 7] = torch.nan
    z, left = positions.project_positions(maps, basis, 1.0)
    assert torch.equal(left.isnan().nonzero(), torch.tensor([[7]]))
    assert z[7].isnan().all()
    assert z[:7].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("run", [1, 3])
@pytest.mark.parametrize(("channels", "rank"), [(16, 4), (23, 20), (64, 64)])
@pytest.mark.parametrize("threads", [1, 2])
def test_transposed_product_of_rows_in_pieces(dtype, run, channels, rank, threads, monkeypatch):
    monkeypatch.setattr(native, "threads_for", lambda *_: threads)
    lines = torch.randn(200, channels).to(dtype)
    indices = torch.randint(0, 200 - 11 - run + 1, (117,))
    pieces = Picked(lines, indices, torch.tensor([0, 11, 4]), run)
    z = torch.randn(117, rank).to(dtype)
    number = torch_ops.score_dtype(dtype)
    norms, sums = torch.empty(117, dtype=number), torch.empty(pieces.columns, dtype=dtype)
    product = native.transposed_mm(z, pieces, norms, sums)
    rows = pieces.matrix().double()
    fine = 1e-5 if number == torch.float32 else 1e-13
    assert_close(product.double(), z.double().t() @ rows, rtol=fine, atol=100 * fine)
    assert_close(norms.double(), torch.linalg.vector_norm(rows, dim=1), rtol=fine, atol=0)
    assert_close(sums, rows.sum(0).to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=100 * fine)
    assert torch.equal(native.transposed_mm(z, Picked(pieces.matrix())), product)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("run", [1, 3])
@pytest.mark.parametrize(("channels", "p"), [(16, 20), (7, 33), (40, 64)])
@pytest.mark.parametrize("exchanged", [False, True])
def test_product_of_rows_in_pieces(dtype, run, channels, p, exchanged, monkeypatch):
    monkeypatch.setattr(library, "prefers_own_gemm", lambda dtype: True)
    lines = torch.randn(200, channels).to(dtype)
    offsets = torch.tensor([0, 11, 4])
    indices = torch.randint(0, 200 - 11 - run + 1, (90,)).sort().values
    pieces = Picked(lines, indices, offsets, run)
    g = torch.randn(300, p).to(dtype)
    others = Picked(g, torch.randint(0, 300, (90,)))
    weights = torch.rand(90, dtype=torch_ops.score_dtype(dtype))
    x, y = (others, pieces) if exchanged else (pieces, others)
    expand = torch.randn(x.columns, 4).to(dtype)
    z = torch.randn(90, 4).to(dtype)
    zg = torch.randn(4, y.columns, dtype=weights.dtype)
    rest = x.matrix().double() - z.double() @ expand.double().t()
    exact = (weights.double().unsqueeze(1) * y.matrix().double()).t() @ rest
    exact += zg.double().t() @ expand.double().t()
    found = native.product(x, y, weights, (expand, z, zg))
    assert found is not None
    error = torch.linalg.matrix_norm(found.double() - exact) / torch.linalg.matrix_norm(exact)
    assert error < 10 * torch.finfo(dtype).eps
    turned = native.product(x, y, weights, (expand, z, zg), transposed=True)
    assert torch.equal(turned.t(), found)


def test_rows_beyond_the_lines_are_refused(monkeypatch):
    monkeypatch.setattr(library, "prefers_own_gemm", lambda dtype: True)
    lines, g = torch.randn(20, 16), Picked(torch.randn(2, 16))
    for first in (-1, 16):
        pieces = Picked(lines, torch.tensor([0, first]), torch.tensor([0, 3]), run=2)
        with pytest.raises(IndexError):
            native.product(pieces, g)
        with pytest.raises(IndexError):
            native.transposed_mm(torch.randn(2, 4), pieces)
    pieces = Picked(lines, torch.tensor([0, 15]), torch.tensor([0, 3]), run=2)
    assert_close(native.product(pieces, g), g.lines.t() @ pieces.matrix())
