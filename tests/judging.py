"""How the kernels' results are judged, and the operands and formulas both kernel suites share."""

import re

import torch

from memaop_triton.kernels.tuning.config import GemmConfig

SMALL = GemmConfig(32, 16, 16, 4, 2, group=2)
LAYOUTS = ("plain", "transposed", "strided", "padded")


def figures(page):
    """The numbers on a page in their order: a page whose words change is not out of date."""
    return re.findall(r"\d+(?:[.,]\d+)*", page)


def as_good_as(result, theirs, exact):
    """Fails if a result is further from the exact one than twice what PyTorch's own is.

    `exact` is in float64, `theirs` is PyTorch's result in the dtypes of the kernel.
    """
    assert result.shape == exact.shape
    assert not result.isnan().any(), "never written, or computed from what was not"
    scale = exact.abs().max().item() if exact.numel() else 0.0
    error, allowed = (
        (r.double() - exact).abs().max().item() if exact.numel() else 0.0 for r in (result, theirs)
    )
    tiny = 4 * torch.finfo(torch.float32).eps * scale
    assert error <= 2 * allowed + tiny, f"error {error:.3g}, PyTorch's own {allowed:.3g}"


def laid_out(numbers, layout):
    """The same matrix with other strides, or as a part of one that is NaN elsewhere."""
    if layout == "transposed":
        return numbers.mT.contiguous().mT
    rows, columns = numbers.shape
    if layout == "strided":
        whole = numbers.new_full((3 * rows, 2 * columns), torch.nan)
        part = whole[::3, ::2]
    elif layout == "padded":
        whole = numbers.new_full((rows + 4, columns + 16), torch.nan)
        part = whole[2:-2, 8:-8]
    else:
        return numbers
    part.copy_(numbers)
    return part


def operands(rows, n, p, dtype, layout="plain", device="cpu"):
    """X [rows, n] and G [rows, p] of normal numbers."""
    return tuple(
        laid_out(torch.randn(rows, columns, device=device).to(dtype), layout) for columns in (n, p)
    )


def drawn_rows(rows, count, dtype=torch.int64, device="cpu"):
    """`count` row numbers in ascending order: all of them, or draws with replacement."""
    if count == rows:
        return torch.arange(rows, dtype=dtype, device=device)
    return torch.randint(0, rows, (count,), device=device).sort().values.to(dtype)


def drawn_blocks(numbers, block_rows, device="cpu"):
    """Every row number of the blocks with these numbers; those of a last block may exceed M."""
    first = torch.tensor(numbers, device=device)[:, None] * block_rows
    return (first + torch.arange(block_rows, device=device)).flatten()


def outer_products(x, g, indices, weights=None, dtype=torch.float64):
    """Σ_k w_k g[i_k]ᵀ x[i_k], summed in `dtype`; rows from M on count as zero."""
    inside = indices < x.shape[0]
    rows = indices[inside].long()
    left = g[rows]
    if weights is not None:
        left = left * weights[inside, None].to(g.dtype)
    return left.T.to(dtype) @ x[rows].to(dtype)


def check_products(result, x, g, indices, weights=None, plus=0.0):
    """Judge a gather GEMM by `outer_products`; `plus` is what else the exact result holds."""
    exact = outer_products(x.double(), g.double(), indices, weights) + plus
    theirs = outer_products(x, g, indices, weights, dtype=result.dtype)
    as_good_as(result, (theirs + plus).to(result.dtype), exact)
