"""Checks of the kernels that make a basis orthonormal, which two suites make.

tests/interpret runs them on the CPU, tests/sanitize under ttsem, whose tensors are on "cuda".
"""

import torch

from memaop_triton.kernels.gpu.orthonormal import orthonormalise_
from tests.judging import laid_out

SHAPES = [(1, 1), (10, 10), (75, 16), (40, 17)]  # N, r


def _of_condition(n, r, decades):
    u, v = (torch.linalg.qr(torch.randn(k, r).double()).Q for k in (n, r))
    return (u * torch.logspace(0, -decades, r, dtype=torch.float64) @ v.T).float()


def _one_row(n, r):
    product = torch.zeros(n, r)
    product[n // 2] = torch.randn(r)
    return product


def _with_zero_column(n, r):
    product = torch.randn(n, r)
    product[:, 1 : 2 + r // 2] = 0
    return product


def _of_rank(n, r, rank):
    return torch.randn(n, rank) @ torch.randn(rank, r)


# Products of a power iteration, by what is difficult about them: [N, r] for N and r.
WELL = {
    "random": torch.randn,
    "columns differ by 1e6": lambda n, r: torch.randn(n, r) * torch.logspace(0, -6, r),
    "columns differ by 1e60": lambda n, r: torch.randn(n, r) * torch.logspace(30, -30, r),
    "huge": lambda n, r: torch.rand(n, r) * 3e38,
    "tiny": lambda n, r: torch.rand(n, r) * 1e-37,
}
ILL = {
    "equal columns": lambda n, r: torch.randn(n, 1).expand(n, r).clone(),
    "one row": _one_row,
    "zero columns": _with_zero_column,
    "rank 1": lambda n, r: _of_rank(n, r, 1),
    "rank r/2": lambda n, r: _of_rank(n, r, max(1, r // 2)),
    "condition 1e4": lambda n, r: _of_condition(n, r, 4),
    "condition 1e6": lambda n, r: _of_condition(n, r, 6),
    "condition 1e12": lambda n, r: _of_condition(n, r, 12),
    "powers": lambda n, r: torch.linspace(0, 1, n)[:, None] ** torch.arange(r),
    "nearly parallel": lambda n, r: 1 + 1e-3 * torch.randn(n, r),
}
PRODUCTS = WELL | ILL


def basis(n, r, device="cpu", layout="transposed"):
    """Orthonormal columns, one after the other in memory unless another layout is asked for."""
    return laid_out(torch.linalg.qr(torch.randn(n, r)).Q.to(device), layout)


def defect(q):
    """‖QᵀQ − I‖₂."""
    q = q.double().cpu()
    return float(torch.linalg.matrix_norm(q.T @ q - torch.eye(q.shape[1]).double(), 2))


def lost(q, product):
    """For each column of the product, the part of its norm that is outside the first columns of Q.

    Column j must lie within the first j + 1 of them.
    """
    q, p = q.double().cpu(), product.double().cpu()
    p = p / p.abs().amax(0).clamp(min=1e-300)
    p = p / p.norm(dim=0).clamp(min=1e-300)
    inside = torch.triu(q.T @ p)
    return (p - q @ inside).norm(dim=0)


def check_product(name, shape, layout="plain", due=None, device="cpu"):
    """One product by its name: orthonormal, columns in order, and the copy in half precision."""
    n, r = shape
    product = laid_out(PRODUCTS[name](n, r).to(device), layout)
    before = product.clone()
    q = basis(n, r, device)
    address, strides = q.data_ptr(), q.stride()
    also = torch.full((n, r), torch.nan, dtype=torch.float16, device=device)
    is_due = True if due is None else torch.tensor(due, device=device)
    taken = orthonormalise_(q, product, is_due, also=also)
    assert taken.dtype == torch.bool
    assert taken.shape == ()
    assert taken
    assert (q.data_ptr(), q.stride()) == (address, strides)
    assert torch.equal(product, before)
    assert torch.equal(also, q.half())
    # The estimate allows 1e-3 of both by far. LAPACK stays below 1e-6, and in the lost part of
    # ill-conditioned products random directions outweigh what is small in a column.
    assert defect(q) <= (2e-6 if name in WELL else 1e-4)
    assert float(lost(q, product).max()) <= (2e-6 if name in WELL else 1e-3)


def check_kept(value, due, device="cpu"):
    """Q stays as it is, and is never touched: the product is zero, not finite, or not due."""
    product = torch.randn(70, 5, device=device)
    if value == 0:
        product.zero_()
    elif value is not None:
        product[69, 3] = value
    q = basis(70, 5, device)
    before, also = q.clone(), torch.full((70, 5), torch.nan, device=device)
    is_due = torch.tensor([due], device=device)
    assert not orthonormalise_(q, product, is_due, also=also)
    assert torch.equal(q, before)
    assert also.isnan().all()


def check_leading_columns(device="cpu"):
    """The first r columns are what r columns alone give, in a basis of whatever layout."""
    for name in WELL:
        product = PRODUCTS[name](90, 20).to(device)
        whole, few = basis(90, 20, device), basis(90, 5, device, "strided")
        assert orthonormalise_(whole, product)
        assert orthonormalise_(few, product[:, :5])
        torch.testing.assert_close(whole[:, :5], few, rtol=0, atol=1e-5, msg=name)
