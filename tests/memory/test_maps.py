"""Gradients of a convolution's outputs as rows: with and without the matrix of them."""

import pytest
import torch
from torch.testing import assert_close

from memaop_triton import dispatch
from memaop_triton.memory.maps import Maps, by_position, is_channels_last
from tests.compiled import needs_compiler

ORDERS = {
    "channels first": lambda t: t,
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "neither": lambda t: t.mT.contiguous().mT,
}


@pytest.fixture(params=["C", "PyTorch"])
def way(request, monkeypatch):
    if request.param == "PyTorch":
        monkeypatch.setenv("MEMAOP_TRITON_BACKEND", "torch")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(3, 20, 5, 7), (2, 6, 11), (2, 17, 3, 4, 5)])
def test_rows_are_positions(shape, order, way):
    maps = torch.randn(shape, dtype=torch.float64)
    given = ORDERS[order](maps) if len(shape) > 3 or order != "neither" else maps
    rows = maps.movedim(1, -1).flatten(0, -2)
    found, count = Maps(given), len(rows)
    assert torch.equal(by_position(given), rows)
    assert found.shape == rows.shape
    assert_close(found.norms(), torch.linalg.vector_norm(rows, dim=1))
    indices = torch.randperm(count)[:9]
    assert torch.equal(found.picked(indices).matrix(), rows[indices])
    assert torch.equal(found[1::4], rows[1::4])
    assert_close(found.sum_rows(), rows.sum(0))
    basis = torch.linalg.qr(torch.randn(shape[1], 4, dtype=torch.float64)).Q
    for got, expected in zip(found.project(basis), dispatch.project_rows(rows, basis), strict=True):
        assert_close(got, expected)
    assert torch.equal(found.matrix(), rows)


@needs_compiler
def test_the_matrix_is_not_made_where_channels_come_first():
    maps = Maps(torch.randn(2, 16, 5, 5))
    maps.norms(), maps.project(torch.eye(16, 4)), maps.picked(torch.tensor([3, 40])), maps[::3]
    assert "_matrix" not in vars(maps)
    rows = maps.picked(torch.tensor([3, 40])).matrix()
    assert torch.equal(maps.matrix()[[3, 40]], rows)
    assert maps.picked(torch.tensor([3])).lines is maps.matrix()  # as it is there now


def test_channels_that_are_last_are_a_view():
    maps = torch.randn(2, 16, 5, 5).to(memory_format=torch.channels_last)
    assert is_channels_last(maps)
    assert Maps(maps).matrix().data_ptr() == maps.data_ptr()
