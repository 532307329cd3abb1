"""Orthonormal columns for a basis: Q ← the Gram–Schmidt factor of P, without a solver.

P is [N, r] with r ≤ 64, the product that a power iteration on Q leaves. Cholesky's factor of its
Gram matrix gives the columns that Gram–Schmidt would, each of them from the ones before it alone:

    B = Pᵀ P = Rᵀ R        Q = P R⁻¹

In float32 this is as good as P is conditioned, squared. So it is repeated on its own result, and
all but the last round add a multiple of the identity to B ("shifted CholeskyQR", Fukaya, Kannan,
Nakatsukasa, Yamamoto, Yanagisawa, SIAM J. Sci. Comput. 2020): a direction that is small in P, down
to the rounding of float32, grows by up to 1/√shift in each round, until the last one sees columns
that are nearly orthonormal. Columns whose pivot is little more than the shift depend on the ones
before them, numerically. They get random directions in the second and the third round, which come
from a counter and so are always the same.

1. `gram_kernel` takes a share of P's rows in each program, scales its columns to a largest
   element near 1, and leaves its part of B.
2. `round_kernel`, once a round: every program adds the parts, which takes a launch less than if
   one did it, factorises B, multiplies its share of the rows by R⁻¹ and leaves its part of the next
   round's B.

A program ends at once if the refresh is not due, or if P is zero or not finite: Q then stays as it
is. Sums are taken in one order, so a refresh repeats bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memaop_triton.kernels import targets
from memaop_triton.kernels.gpu import launch
from memaop_triton.kernels.gpu.primitives import mix
from memaop_triton.kernels.tuning.config import padded_rank

# Some ten times the rounding error of B, whose diagonal is 1, in the worst case that was seen.
SHIFT = 1e-5
# Length of a random direction where a column is lost altogether. It outweighs what is left of
# directions that are below 1e-6 of the largest in P.
FILL = 0.3
ROUNDS = 4
# The bits of infinity.
_INFINITE = tl.constexpr(0x7F800000)
# A pivot of B, whose diagonal is near 1, is that of rounding errors if it is smaller.
_LEAST_PIVOT = tl.constexpr(1e-7)


@triton.jit
def _exponent(peak):
    """The biased exponent of float32 bits, kept where its reciprocal is a normal number too."""
    return tl.minimum(tl.maximum(peak >> 23, 1), 253)


@triton.jit
def _reciprocal(exponent):
    """1/2^e as float32, for a biased exponent."""
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _rows_of_p(p_ptr, first, N, rank, p_row, p_col, BLOCK: tl.constexpr, RANK: tl.constexpr):
    """BLOCK rows of P from `first` on, [BLOCK, RANK]; zero beyond the matrix."""
    n, r = first + tl.arange(0, BLOCK), tl.arange(0, RANK)
    places = (p_ptr + n.to(tl.int64) * p_row)[:, None] + (r.to(tl.int64) * p_col)[None, :]
    return tl.load(places, mask=(n < N)[:, None] & (r < rank)[None, :], other=0)


@triton.jit
def gram_kernel(
    p_ptr, due_ptr, peaks_ptr, parts_ptr, N, rank, p_row, p_col,
    BLOCK: tl.constexpr, RANK: tl.constexpr, SHARES: tl.constexpr, ALWAYS: tl.constexpr,
):  # fmt: skip
    """For a share of the rows: the bits of each column's largest |p|, and Pᵀ P of scaled columns.

    Bits of numbers that are not negative are ordered like these, infinity and NaN above all others.
    """
    due = 1
    if not ALWAYS:
        due = tl.load(due_ptr).to(tl.int32)
    if due != 0:
        share = tl.program_id(0)
        r = tl.arange(0, RANK)
        steps = tl.cdiv(N, BLOCK)
        start, end = steps * share // SHARES * BLOCK, steps * (share + 1) // SHARES * BLOCK
        peak = tl.zeros((RANK,), tl.int32)
        for first in range(start, end, BLOCK):
            p = _rows_of_p(p_ptr, first, N, rank, p_row, p_col, BLOCK, RANK)
            peak = tl.maximum(peak, tl.max(p.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0))
        tl.store(peaks_ptr + share * RANK + r, peak)
        scale = _reciprocal(_exponent(peak))
        part = tl.zeros((RANK, RANK), tl.float32)
        for first in range(start, end, BLOCK):
            p = _rows_of_p(p_ptr, first, N, rank, p_row, p_col, BLOCK, RANK) * scale[None, :]
            part = tl.dot(tl.trans(p), p, part, input_precision="ieee")
        places = parts_ptr + share * RANK * RANK + r[:, None] * RANK + r[None, :]
        tl.store(places, part)


@triton.jit
def _largest(peaks_ptr, RANK: tl.constexpr, SHARES: tl.constexpr):
    """The bits of the largest |p| of each column, [RANK]."""
    share, r = tl.arange(0, SHARES), tl.arange(0, RANK)
    return tl.max(tl.load(peaks_ptr + share[:, None] * RANK + r[None, :]), axis=0)


@triton.jit
def _sum_of_parts(
    parts_ptr, peaks_ptr, exponent,
    RANK: tl.constexpr, SHARES: tl.constexpr, CHUNK: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """B [RANK, RANK]. Parts of the first one are SCALED by the peaks of their own share."""
    r = tl.arange(0, RANK)
    total = tl.zeros((RANK, RANK), tl.float32)
    for first in range(0, SHARES, CHUNK):
        share = first + tl.arange(0, CHUNK)
        lines = share[:, None] * RANK + r[None, :]
        part = tl.load(parts_ptr + lines[:, :, None] * RANK + r[None, None, :])
        if SCALED:
            peak = tl.load(peaks_ptr + lines)
            # A power of two below 1: how much smaller the share's columns are than the whole ones.
            smaller = tl.maximum(127 + _exponent(peak) - exponent[None, :], 0) << 23
            factor = smaller.to(tl.float32, bitcast=True)
            part = part * factor[:, :, None] * factor[:, None, :]
        total += tl.sum(part, axis=0)
    return total


@triton.jit
def _part_lost(pivot, shift):
    """How much of a column is to be replaced: all of it where the pivot is the shift alone."""
    part = tl.minimum(shift / pivot, 1)
    return part * part


@triton.jit
def _inverse_factor(b, rank, shift, RANK: tl.constexpr, FILLED: tl.constexpr):
    """L⁻¹ of B = L Lᵀ, lower triangular, and the part of each column of P that is to be replaced.

    Elimination in place: in step j the part of B below row j loses the multiples of that row, and
    the columns of B that are done with make room for L⁻¹ of unit diagonal. What is to be replaced
    by another direction, with FILLED, must not be taken from later columns.
    """
    i = tl.arange(0, RANK)
    pivots = tl.full((RANK,), 1.0, tl.float32)
    for j in range(0, rank):
        is_j, below = i == j, i > j
        row = tl.sum(tl.where(is_j[:, None], b, 0), axis=0)
        column = tl.sum(tl.where(is_j[None, :], b, 0), axis=1)
        pivot = tl.maximum(tl.sum(tl.where(is_j, column, 0), axis=0), _LEAST_PIVOT)
        factor = tl.where(below, column / pivot, 0)
        if FILLED:
            factor *= 1 - _part_lost(pivot, shift)
        b = tl.where(below[:, None] & is_j[None, :], 0, b)
        b -= factor[:, None] * tl.where(is_j, 1, row)[None, :]
        pivots = tl.where(is_j, pivot, pivots)
    unit = tl.where(i[:, None] == i[None, :], 1, tl.where(i[:, None] > i[None, :], b, 0))
    inverse = tl.where((i < rank)[:, None], unit / tl.sqrt(pivots)[:, None], 0)
    return inverse, _part_lost(pivots, shift)


@triton.jit
def _diagonal(b, RANK: tl.constexpr, AXIS: tl.constexpr):
    i = tl.arange(0, RANK)
    return tl.sum(tl.where(i[:, None] == i[None, :], b, 0), axis=AXIS)


@triton.jit
def _one_over_norm(square):
    """1/√square; 0 for 0."""
    return tl.where(square > 0, 1 / tl.sqrt(tl.where(square > 0, square, 1)), 0)


@triton.jit(do_not_specialize=["seed"])
def round_kernel(
    p_ptr, out_ptr, copy_ptr, due_ptr, taken_ptr, peaks_ptr, parts_ptr, next_ptr, N, rank, seed,
    shift, spread, p_row, p_col, out_row, out_col, copy_row,
    BLOCK: tl.constexpr, RANK: tl.constexpr, SHARES: tl.constexpr, CHUNK: tl.constexpr,
    ALWAYS: tl.constexpr, FIRST: tl.constexpr, FILLED: tl.constexpr,
    LAST: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    """out = P R⁻¹ with Rᵀ R = B + shift·I for a share of the rows, and its part of the next B.

    With FILLED, columns that are lost get random directions, numbers between −½ and ½ times
    `spread`. The last round has no next B: it says whether Q has changed, and copies it if COPIED.
    """
    share = tl.program_id(0)
    taken = 1
    if not ALWAYS:
        taken = tl.load(due_ptr).to(tl.int32)
    if taken != 0:
        peak = _largest(peaks_ptr, RANK, SHARES)
        largest = tl.max(peak, axis=0)
        taken = ((largest > 0) & (largest < _INFINITE)).to(tl.int32)
        if taken != 0:
            r = tl.arange(0, RANK)
            exponent = _exponent(peak)
            b = _sum_of_parts(parts_ptr, peaks_ptr, exponent, RANK, SHARES, CHUNK, FIRST)
            if FIRST:
                along = _one_over_norm(_diagonal(b, RANK, 0))[None, :]
                b *= _one_over_norm(_diagonal(b, RANK, 1))[:, None] * along
            b += tl.where(r[:, None] == r[None, :], shift, 0)
            inverse, lost = _inverse_factor(b, rank, shift, RANK, FILLED)
            if FIRST:
                inverse *= along
            lost *= spread
            inverse = tl.trans(inverse)
            part = tl.zeros((RANK, RANK), tl.float32)
            steps = tl.cdiv(N, BLOCK)
            start, end = steps * share // SHARES * BLOCK, steps * (share + 1) // SHARES * BLOCK
            for first in range(start, end, BLOCK):
                p = _rows_of_p(p_ptr, first, N, rank, p_row, p_col, BLOCK, RANK)
                if FIRST:
                    p *= _reciprocal(exponent)[None, :]
                out = tl.dot(p, inverse, input_precision="ieee")
                n = first + tl.arange(0, BLOCK)
                inside = (n < N)[:, None] & (r < rank)[None, :]
                if FILLED:
                    number = (n[:, None] * 64 + r[None, :]).to(tl.uint32)
                    bits = mix(number ^ (seed << 30))
                    random = (bits >> 8).to(tl.float32) * 5.9604644775390625e-08 - 0.5
                    out += tl.where((n < N)[:, None], random * lost[None, :], 0)
                places = out_ptr + (n.to(tl.int64) * out_row)[:, None]
                tl.store(places + (r.to(tl.int64) * out_col)[None, :], out, mask=inside)
                if COPIED:
                    places = copy_ptr + (n.to(tl.int64) * copy_row)[:, None] + r[None, :]
                    tl.store(places, out.to(copy_ptr.dtype.element_ty), mask=inside)
                if not LAST:
                    part = tl.dot(tl.trans(out), out, part, input_precision="ieee")
            if not LAST:
                places = next_ptr + share * RANK * RANK + r[:, None] * RANK + r[None, :]
                tl.store(places, part)
    if LAST and share == 0:
        tl.store(taken_ptr, taken)


def orthonormalise_(
    q: Tensor, product: Tensor, is_due: Tensor | bool = True, *, also: Tensor | None = None
) -> Tensor:
    """Q ← Gram–Schmidt of `product`, in place and without a host synchronisation.

    Five launches, which do nothing where the refresh is not due. Columns that depend on the ones
    before them are replaced by fixed random directions, orthonormal to all others as well.

    Args:
        q: [N, r] float32, r ≤ 64, any strides.
        product: P, [N, r] float32, any strides. Zero or not finite: Q is kept.
        is_due: Whether to take it over: of the host, or bool with one element on the device.
        also: [N, r], any floating dtype, rows of unit stride: gets a copy of what Q becomes.

    Returns:
        Whether Q has changed: bool, on the device, without dimensions.
    """
    device, (columns, rank) = q.device, q.shape
    if is_due is False:
        return torch.zeros((), dtype=torch.bool, device=device)
    # In between, 32 columns spill registers under one compiler or another.
    padded = 16 if padded_rank(rank) == 16 else 64
    # Every program reads all parts: the larger they are, the fewer of them.
    block = 32 if padded == 64 else 64
    threads, most = (256, 32) if padded == 64 else (128, 64)
    shares = min(most, triton.next_power_of_2(triton.cdiv(columns, block)))

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    taken = empty(dtype=torch.bool)
    peaks, rows = empty(shares, padded, dtype=torch.int32), empty(columns, rank)
    parts, following = empty(shares, padded, padded), empty(shares, padded, padded)
    shared: dict[str, Any] = {
        "due_ptr": is_due.view(torch.int8) if isinstance(is_due, Tensor) else None,
        "peaks_ptr": peaks, "N": columns, "rank": rank,
        "BLOCK": block, "RANK": padded, "SHARES": shares,
        "ALWAYS": not isinstance(is_due, Tensor),
        "num_warps": threads // targets.current(device).warp_size, "num_stages": 1,
    }  # fmt: skip
    p_row, p_col = product.stride()
    launch.launch(
        gram_kernel, (shares,),
        p_ptr=product, parts_ptr=parts, p_row=p_row, p_col=p_col, **shared,
    )  # fmt: skip
    for number in range(ROUNDS):
        is_first, is_last = number == 0, number == ROUNDS - 1
        source, out = product if is_first else rows, q if is_last else rows
        copy = also if is_last else None
        launch.launch(
            round_kernel,
            (shares,),
            p_ptr=source, out_ptr=out, copy_ptr=copy,
            taken_ptr=taken.view(torch.int8) if is_last else None,
            parts_ptr=parts, next_ptr=None if is_last else following,
            seed=number, shift=0.0 if is_last else SHIFT, spread=FILL * (12 / columns) ** 0.5,
            p_row=source.stride(0), p_col=source.stride(1),
            out_row=out.stride(0), out_col=out.stride(1),
            copy_row=None if copy is None else copy.stride(0),
            CHUNK=min(shares, max(1, 4096 // padded**2)),
            FIRST=is_first, FILLED=not is_first and not is_last, LAST=is_last,
            COPIED=copy is not None,
            **shared,
        )  # fmt: skip
        parts, following = following, parts
    return taken
