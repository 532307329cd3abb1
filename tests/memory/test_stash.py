"""What is kept of the inputs: whole rows, their norms and products, with and without a subspace."""

import pytest
import torch

from memaop_triton.memory.stash import BITS, Stash

ROWS, COLUMNS, RANK = 2100, 48, 4


@pytest.fixture(params=[False, True], ids=["plain", "beside a subspace"])
def stash(request):
    x = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    basis = None
    if request.param:
        basis = torch.linalg.qr(torch.randn(COLUMNS, RANK, dtype=torch.float64)).Q
        x += 5 * torch.randn(ROWS, RANK, dtype=torch.float64) @ basis.T
    made = Stash.of(x, BITS["int8"], basis)
    assert (made.inside is None) == (basis is None)
    return made, x


def test_what_is_kept_gives_the_rows_again(stash):
    made, x = stash
    twin = Stash.from_tensors(made.tensors, BITS["int8"], x.dtype)
    assert (twin.shape, twin.dtype, twin.device) == (x.shape, x.dtype, x.device)
    rows = twin[:]
    assert (rows - x).norm() < 0.01 * x.norm()
    assert torch.equal(twin[5:2000:7], rows[5:2000:7])
    assert torch.equal(torch.cat([part for _, part in twin.chunks()]), rows)
    assert made.nbytes == sum(a.nbytes for a in made.tensors)


def test_norms_are_those_of_whole_rows_and_of_what_was_rounded(stash):
    made, _ = stash
    every = torch.arange(ROWS)
    torch.testing.assert_close(made.norms(), made[:].norm(dim=1), rtol=0.01, atol=0)
    g, weights = torch.randn(ROWS, 3, dtype=torch.float64), torch.rand(ROWS)
    rest, rows, left = made.rest_and_rows_of(g, every, weights)
    rest, rows = rest.matrix(), rows.matrix()
    torch.testing.assert_close(made.rest_norms, rest.norm(dim=1))
    assert torch.equal(rows, g)
    assert left is weights
    if made.inside is not None:
        assert (made.rest_norms < 0.9 * made.norms()).double().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_products_take_every_row(stash, dtype):
    made, x = stash
    made = Stash.of(x.to(dtype), BITS["int8"])
    a = torch.randn(ROWS, 3).to(dtype)
    product = made.transposed_mm(a)
    assert product.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = a.double().T @ made[:].double()
    torch.testing.assert_close(product.double(), exact, rtol=0.01, atol=0.02 * exact.std().item())


def test_projections_are_those_of_the_rows(stash):
    made, _ = stash
    basis = torch.linalg.qr(torch.randn(COLUMNS, 3, dtype=torch.float64)).Q
    z, rest = made.project(basis)
    rows = made[:]
    scale = (rows @ basis).norm() / z.norm()
    torch.testing.assert_close(scale * z, rows @ basis)
    torch.testing.assert_close(rest, (rows - rows @ basis @ basis.T).norm(dim=1))
