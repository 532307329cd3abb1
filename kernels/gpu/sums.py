"""What programs of one launch have left in parts, added up by another launch.

Two kinds of parts, because one launch may have to add up both: those of a product, few and large,
and lines of column sums, many and short. Each is added in one order, so that it repeats bit for
bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memaop_triton.kernels.gpu import launch

BLOCK = 1024  # numbers of a product that a program adds up
COLUMNS = 32  # columns whose sums a program adds up
LINES = 64  # lines of these that it reads at a time


class Product(NamedTuple):
    """A product, Σ `parts` − Σ `minus`.

    Attributes:
        parts: [S, ...] float32, contiguous.
        out: Of the shape of a part, contiguous, of any floating dtype.
        minus: [T, ...] float32, contiguous, or `None`.
    """

    parts: Tensor
    out: Tensor
    minus: Tensor | None = None


class ColumnSums(NamedTuple):
    """Sums of the columns of a matrix, not added up yet.

    Attributes:
        lines: Of some of its rows each, [T, P] float32, contiguous.
        out: [P], of any floating dtype; filled by `add_up`.
    """

    lines: Tensor
    out: Tensor

    def total(self) -> Tensor:
        """The sums, [P], by a launch for them alone."""
        add_up(None, self)
        return self.out


@triton.jit
def _add_product(
    parts_ptr, minus_ptr, out_ptr, parts, minus, count, program,
    BLOCK: tl.constexpr, SUBTRACT: tl.constexpr,
):  # fmt: skip
    """out = Σ parts, less Σ minus with SUBTRACT, for BLOCK numbers."""
    places = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    total = tl.zeros((BLOCK,), tl.float32)
    parts_ptr += places
    for _ in range(0, parts):
        total += tl.load(parts_ptr, mask=inside, other=0)
        parts_ptr += count
    if SUBTRACT:
        minus_ptr += places
        for _ in range(0, minus):
            total -= tl.load(minus_ptr, mask=inside, other=0)
            minus_ptr += count
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_lines(
    lines_ptr, sums_ptr, lines, columns, program,
    COLUMNS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """sums = Σ lines for COLUMNS columns."""
    column = program * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros((LINES, COLUMNS), tl.float32)
    for first in range(0, lines, LINES):
        line = first + tl.arange(0, LINES)
        places = lines_ptr + line.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(places, mask=(line < lines)[:, None] & inside[None, :], other=0)
    added = tl.sum(total, 0).to(sums_ptr.dtype.element_ty)
    tl.store(sums_ptr + column, added, mask=inside)


@triton.jit(do_not_specialize=["parts", "minus", "lines", "products"])
def add_up_kernel(
    parts_ptr, minus_ptr, out_ptr, parts, minus, count, products,
    lines_ptr, sums_ptr, lines, columns,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr,
    PRODUCT: tl.constexpr, SUBTRACT: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """The first `products` programs add up a product, the others column sums."""
    program = tl.program_id(0)
    if PRODUCT and SUMS:
        if program < products:
            _add_product(
                parts_ptr, minus_ptr, out_ptr, parts, minus, count, program, BLOCK, SUBTRACT
            )
        else:
            _add_lines(lines_ptr, sums_ptr, lines, columns, program - products, COLUMNS, LINES)
    elif PRODUCT:
        _add_product(parts_ptr, minus_ptr, out_ptr, parts, minus, count, program, BLOCK, SUBTRACT)
    else:
        _add_lines(lines_ptr, sums_ptr, lines, columns, program, COLUMNS, LINES)


def add_up(product: Product | None, sums: ColumnSums | None = None) -> None:
    """Fill `product.out` and `sums.out` in one launch; in none where both are `None`."""
    products = 0 if product is None else triton.cdiv(product.out.numel(), BLOCK)
    programs = products
    if sums is not None:
        programs += triton.cdiv(sums.out.numel(), COLUMNS)
    parts, out, minus = product or (None, None, None)
    lines, total = sums or (None, None)
    launch.launch(
        add_up_kernel,
        (programs,),
        parts_ptr=parts, minus_ptr=minus, out_ptr=out,
        parts=0 if parts is None else parts.shape[0],
        minus=0 if minus is None else minus.shape[0],
        count=0 if out is None else out.numel(), products=products,
        lines_ptr=lines, sums_ptr=total,
        lines=0 if lines is None else lines.shape[0],
        columns=0 if total is None else total.numel(),
        BLOCK=BLOCK, COLUMNS=COLUMNS, LINES=LINES,
        PRODUCT=product is not None, SUBTRACT=minus is not None, SUMS=sums is not None,
        num_warps=4, num_stages=1,
    )  # fmt: skip


def parts_of(out: Tensor, split: int) -> Tensor:
    """What `split` programs per tile store their sums into: `out` itself, or float32 parts."""
    if split == 1:
        return out
    return torch.empty((split, *out.shape), dtype=torch.float32, device=out.device)
