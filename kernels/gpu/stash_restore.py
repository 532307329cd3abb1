"""Rows that `stash.py` has stored: those that were selected, as a GEMM takes them.

The dither that was added before the rounding is drawn again, from the same seed, and taken off; the
scales are multiplied by last. The rows of G are gathered and weighted by other programs of the same
launch, so that a library's GEMM takes both: `pack.py` says why.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memaop_triton.kernels import targets
from memaop_triton.kernels.gpu import launch
from memaop_triton.kernels.gpu.primitives import value_of
from memaop_triton.kernels.gpu.stash_blocks import (
    BLOCK,
    HALF,
    NO_COLUMN,
    WIDEST,
    columns_of_slots,
    dither_of,
    end_of_row,
    exact,
    expand_at,
    hadamard_signs,
    highest_bit,
    root_of,
    rotated,
    word_at,
    words_of_block,
)
from memaop_triton.kernels.tuning.config import padded_rank

ROWS, WARPS = 64, 4  # of a program
COLUMNS, GATHERED_COLUMNS = 512, 32  # of X, of G


class Restored(NamedTuple):
    """Selected rows in their order: [K, N] and [K, P], contiguous."""

    x: Tensor
    g: Tensor


@triton.jit
def _numbers_at(start, first, lower, upper, exists, words, BITS: tl.constexpr, CUT: tl.constexpr):
    """Both numbers of each slot in float32, without their dither; with CUT there are slots without.

    `words` are the random ones of the slots.
    """
    has_lower = exists[:, None]
    has_upper = has_lower
    if CUT:
        has_upper = has_lower & (upper != NO_COLUMN)[None, :]
        has_lower = has_lower & (lower != NO_COLUMN)[None, :]
    if BITS == 4:
        slots = first // 2 + tl.arange(0, lower.shape[0])
        packed = tl.load(start[:, None] + slots[None, :], mask=has_lower, other=0)
        low = (packed & 15).to(tl.int8) - 8
        high = (packed >> 4).to(tl.int8) - 8
    else:
        low = tl.load(start[:, None] + (first + lower)[None, :], mask=has_lower, other=0)
        high = tl.load(start[:, None] + (first + upper)[None, :], mask=has_upper, other=0)
        low = low.to(tl.int8, bitcast=True)
        high = high.to(tl.int8, bitcast=True)
    low = low.to(tl.float32) + (0.5 - dither_of(words & 0xFFFF))
    high = high.to(tl.float32) + (0.5 - dither_of(words >> 16))
    return low, high


@triton.jit
def _store_columns(
    out, value, z, expand_ptr, wanted, first, end, e_row, rank,
    CUT: tl.constexpr, RANK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Store `value`, plus z E, as the columns from `first` on, with CUT up to `end`."""
    if RANK > 0:
        e = expand_at(expand_ptr, first, end, e_row, rank, HALF, CUT, RANK).to(tl.float32)
        value = tl.dot(z, e, value, input_precision=EXACT)
    columns = first + tl.arange(0, HALF)
    mask = wanted[:, None] & (columns < end)[None, :] if CUT else wanted[:, None]
    tl.store(out[:, None] + columns[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _restore_narrow(
    numbers, scales, z, expand_ptr, out, exists, wanted, key, block, first, T, e_row, rank,
    BITS: tl.constexpr, RANK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """T columns in narrow blocks, of which `block` is the place of the first one.

    `scales` is where its scale is.
    """
    columns = tl.arange(0, HALF)
    lower, upper, index, width_of_slot = columns_of_slots(T)
    lower_signs = hadamard_signs(columns[None, :], lower[:, None], T).to(tl.float16)
    upper_signs = hadamard_signs(columns[None, :], upper[:, None], T).to(tl.float16)
    width = tl.maximum(highest_bit(columns ^ T), 1)
    before = tl.zeros(width.shape, tl.int32)  # blocks of the tile before a column's
    before_slot = tl.zeros(width_of_slot.shape, tl.int32)
    for bit in tl.static_range(6):
        before += tl.where(width < (32 >> bit), (T >> (5 - bit)) & 1, 0)
        before_slot += tl.where(width_of_slot < (32 >> bit), (T >> (5 - bit)) & 1, 0)
    words = word_at(key, block[:, None] + before_slot[None, :], index[None, :])
    is_inside = (columns < T)[None, :]
    steps = scales[:, None] + before[None, :]
    step = tl.load(steps, mask=exists[:, None] & is_inside, other=0).to(tl.float32)
    low, high = _numbers_at(numbers, first, lower, upper, exists, words, BITS, True)
    value = (rotated(low, lower_signs) + rotated(high, upper_signs)) * step
    value *= root_of(width)[None, :]
    _store_columns(
        out, value, z, expand_ptr, wanted, first, first + T, e_row, rank, True, RANK, EXACT
    )


@triton.jit
def _restore_tile(
    numbers_ptr, scales_ptr, z_ptr, expand_ptr, out_ptr, rows, exists, place, wanted, seed, tile, N,
    rank, e_row, numbers_row, blocks,
    BITS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr, RANK: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of these rows of X, zeros for rows that do not exist."""
    numbers = numbers_ptr + rows.to(tl.int64) * numbers_row
    scales = scales_ptr + rows.to(tl.int64) * blocks
    out = out_ptr + place.to(tl.int64) * N
    first_block = rows.to(tl.int64) * blocks
    key = value_of(seed)
    z = None
    if RANK > 0:
        r = tl.arange(0, RANK)
        z_places = z_ptr + rows.to(tl.int64)[:, None] * rank + r[None, :]
        z = tl.load(z_places, mask=exists[:, None] & (r < rank)[None, :], other=0).to(tl.float32)
    lower = tl.arange(0, HALF)
    upper = lower + HALF
    signs = hadamard_signs(lower[:, None], lower[None, :], HALF).to(tl.float16)
    whole = N // BLOCK  # blocks
    block_end = tl.minimum((tile + 1) * (COLUMNS // BLOCK), whole)
    for block in range(tile * (COLUMNS // BLOCK), block_end):
        first = block * BLOCK
        words = words_of_block(key, first_block + block)
        low, high = _numbers_at(numbers, first, lower, upper, exists, words, BITS, False)
        step = tl.load(scales + block, mask=exists, other=0).to(tl.float32)[:, None] * 0.125
        left = rotated(low + high, signs) * step
        _store_columns(out, left, z, expand_ptr, wanted, first, N, e_row, rank, False, RANK, EXACT)
        right = rotated(low - high, signs) * step
        first += HALF
        _store_columns(out, right, z, expand_ptr, wanted, first, N, e_row, rank, False, RANK, EXACT)
    if TAIL and whole // (COLUMNS // BLOCK) == tile:
        for part in range(0, 2):
            first, T = end_of_row(N, part)
            _restore_narrow(
                numbers, scales + whole, z, expand_ptr, out, exists, wanted, key,
                first_block + whole, first, T, e_row, rank, BITS, RANK, EXACT,
            )  # fmt: skip
            whole += T >> 5


@triton.jit
def _gather_tile(
    g_ptr, weight_ptr, out_ptr, rows, exists, place, wanted, tile, P, g_row, g_col,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of these rows of G, times their weights."""
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    is_inside = (columns < P)[None, :]
    start = g_ptr + rows.to(tl.int64) * g_row
    places = start[:, None] + columns.to(tl.int64)[None, :] * g_col
    g = tl.load(places, mask=exists[:, None] & is_inside, other=0)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + place, mask=wanted, other=0).to(tl.float32)
        g = (g.to(tl.float32) * weight[:, None]).to(g.dtype)
    out_places = (out_ptr + place.to(tl.int64) * P)[:, None] + columns[None, :]
    tl.store(out_places, g, mask=wanted[:, None] & is_inside)


@triton.jit(do_not_specialize=["M", "K", "seed"])
def restore_kernel(
    numbers_ptr, scales_ptr, z_ptr, expand_ptr, x_ptr, index_ptr, g_ptr, weight_ptr, gathered_ptr,
    seed, M, K, N, P, rank, e_row, numbers_row, blocks, g_row, g_col,
    BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, G_COLUMNS: tl.constexpr,
    TAIL: tl.constexpr, RANK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The first programs along axis 1 restore rows of X, the others gather rows of G."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wanted = place < K
    rows = place
    if index_ptr is not None:
        rows = tl.load(index_ptr + place, mask=wanted, other=0)
    exists = wanted & (rows < M)  # a cut block names rows beyond the last one
    tile = tl.program_id(1)
    tiles_of_x = tl.cdiv(N, COLUMNS)
    if g_ptr is None or tile < tiles_of_x:
        _restore_tile(
            numbers_ptr, scales_ptr, z_ptr, expand_ptr, x_ptr, rows, exists, place, wanted, seed,
            tile, N, rank, e_row, numbers_row, blocks, BITS, COLUMNS, TAIL, RANK, EXACT,
        )  # fmt: skip
    else:
        _gather_tile(
            g_ptr, weight_ptr, gathered_ptr, rows, exists, place, wanted, tile - tiles_of_x, P,
            g_row, g_col, G_COLUMNS,
        )  # fmt: skip


def restore_rows(
    stored: tuple[Tensor, Tensor, Tensor],
    bits: int,
    columns: int,
    dtype: torch.dtype,
    indices: Tensor | None = None,
    inside: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Rows that `round_rows` stored, [K, N]; all of them without indices.

    Args:
        stored: Numbers, scales, and the seed, int64 [1] on the device.
        bits: Of the numbers.
        columns: N.
        dtype: Of the result: float16, bfloat16 or float32.
        indices: [K] integers, contiguous. Rows named from M on become zero.
        inside: Z ([M, q], contiguous) and E ([q, N], rows of unit stride), bfloat16, whose product
            is added.
    """
    return _restore(stored, bits, columns, dtype, indices, inside).x


def restore_both(
    stored: tuple[Tensor, Tensor, Tensor],
    bits: int,
    columns: int,
    g: Tensor,
    indices: Tensor,
    weights: Tensor | None = None,
    inside: tuple[Tensor, Tensor] | None = None,
) -> Restored:
    """The selected rows of X and, weighted, of G: what a plain GEMM takes, in the dtype of G.

    Args:
        stored: Numbers, scales and seed of X, as for `restore_rows`.
        bits: Of the numbers.
        columns: N.
        g: [M, P], float16, bfloat16 or float32, any strides.
        indices: [K] integers, contiguous. Rows named from M on become zero.
        weights: [K], floating point; the product is rounded once. 1 each if `None`.
        inside: As for `restore_rows`.
    """
    return _restore(stored, bits, columns, g.dtype, indices, inside, g, weights)


def _restore(
    stored: tuple[Tensor, Tensor, Tensor],
    bits: int,
    columns: int,
    dtype: torch.dtype,
    indices: Tensor | None,
    inside: tuple[Tensor, Tensor] | None,
    g: Tensor | None = None,
    weights: Tensor | None = None,
) -> Restored:
    numbers, scales, seed = stored
    rows = len(scales)
    k = rows if indices is None else indices.numel()
    p = 0 if g is None else g.shape[1]
    z, expand = inside or (None, None)
    rank = 0 if z is None else z.shape[1]
    restored = Restored(
        numbers.new_empty((k, columns), dtype=dtype), numbers.new_empty((k, p), dtype=dtype)
    )
    tiles = triton.cdiv(columns, COLUMNS) + triton.cdiv(p, GATHERED_COLUMNS)
    launch.launch(
        restore_kernel,
        (triton.cdiv(k, ROWS), tiles),
        numbers_ptr=numbers, scales_ptr=scales, z_ptr=z if rank else None,
        expand_ptr=expand if rank else None, x_ptr=restored.x, index_ptr=indices, g_ptr=g,
        weight_ptr=weights, gathered_ptr=restored.g if p else None,
        seed=seed, M=rows, K=k, N=columns, P=p, rank=rank,
        e_row=0 if expand is None else expand.stride(0),
        numbers_row=numbers.shape[1],
        blocks=scales.shape[1],
        g_row=0 if g is None else g.stride(0), g_col=0 if g is None else g.stride(1),
        BITS=bits, ROWS=ROWS, COLUMNS=COLUMNS, G_COLUMNS=GATHERED_COLUMNS,
        TAIL=columns % WIDEST > 0, RANK=padded_rank(rank) if rank else 0,
        EXACT=exact(targets.current(numbers.device)),
        num_warps=2 * WARPS if columns % WIDEST else WARPS, num_stages=2,
    )  # fmt: skip
    return restored
