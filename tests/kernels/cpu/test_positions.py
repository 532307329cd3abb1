"""Passes of the C code over maps, and products of rows that are put together from pieces."""

import pytest
import torch
from torch.testing import assert_close

from memaop_triton.kernels.cpu import library, native, torch_ops
from memaop_triton.kernels.cpu.picked import Picked

pytestmark = pytest.mark.skipif(
    not library.is_compiled(), reason="needs the C code: a C compiler on Linux"
)
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1, 1), (2, 64, 300), (40, 33, 129)])
def test_norms_of_positions(dtype, shape):
    maps = torch.randn(shape).to(dtype)
    found = native.position_norms(maps)
    exact = torch.linalg.vector_norm(maps.double(), dim=1).flatten()
    assert found.dtype == torch_ops.score_dtype(dtype)
    assert_close(found.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_channels_of_some_positions(dtype, threads, monkeypatch):
    monkeypatch.setattr(native, "threads_for", lambda *_: threads)
    maps = torch.randn(6, 17, 23).to(dtype)
    for count in (1, 50, 138):
        indices = torch.randperm(6 * 23)[:count].sort().values
        found = native.gather_positions(maps, indices)
        assert torch.equal(found, maps.movedim(1, -1).reshape(-1, 17)[indices])


def test_maps_that_are_not_contiguous_are_left_to_pytorch():
    maps = torch.randn(2, 5, 7).movedim(1, -1)
    assert native.position_norms(maps) is None
    assert native.gather_positions(maps, torch.tensor([0])) is None


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
    pieces = Picked(lines, torch.tensor([0, 15]), torch.tensor([0, 3]), run=2)
    assert_close(native.product(pieces, g), g.lines.t() @ pieces.matrix())
