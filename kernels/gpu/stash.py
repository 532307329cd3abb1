"""Rows in 4 or 8 bits a number, on a GPU: rounded in one launch, and restored in one.

`kernels/cpu/stash.py` says what is stored. Both kernels take 64 columns at a time, whose product
with their Hadamard matrix is one for the matrix units:

- `round_kernel` owns rows of X, [M, N], and walks over their columns. Beside a subspace it does so
  twice, first for z = x Eᵀ / s² (E = s Qᵀ, [q, N]) and then for x − z E: the second time the rows
  come from the cache.
- `restore_kernel` owns rows that were selected, and some of their columns. Signs and stored numbers
  are integers, so their product is exact; it is multiplied by the scales afterwards. Other programs
  of the same launch gather and weight the rows of G, so that a library's GEMM takes both.

Numbers are drawn from a seed and the place of a block, as in C: the same seed stores the same bits,
but where two sums of float32 that are rounded in another order lie on two sides of a draw.
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
    NO_COLUMN,
    SLOTS,
    columns_of_slots,
    hadamard_signs,
    highest_bit,
    root_of,
    rotated,
    rounded_at_random,
    scale_above,
    word_at,
    words_of_block,
)
from memaop_triton.kernels.targets import Target
from memaop_triton.kernels.tuning.config import padded_rank

# Of a program: 16 rows for each of its warps, so that the matrix units give none of them the same.
ROUNDED_ROWS, ROUNDING_WARPS = 32, 2
RESTORED_ROWS, RESTORING_WARPS = 64, 4
RESTORED_COLUMNS, GATHERED_COLUMNS = 512, 64

_BLOCK = tl.constexpr(BLOCK)


class Rounded(NamedTuple):
    """Rows as they are stored.

    Attributes:
        numbers: uint8 [M, bytes of a row].
        scales: bfloat16 [M, blocks].
        norms: Of the rows as they will be restored without Z E, float32 [M].
        z: Z, bfloat16 [M, q], or `None`.
    """

    numbers: Tensor
    scales: Tensor
    norms: Tensor
    z: Tensor | None


class Restored(NamedTuple):
    """Selected rows in their order: [K, N] and [K, P], contiguous."""

    x: Tensor
    g: Tensor


@triton.jit
def _columns_at(start, first, N, col, CUT: tl.constexpr):
    """64 columns of rows from `first` on; with CUT those beyond N are zero."""
    columns = first + tl.arange(0, _BLOCK)
    places = start[:, None] + columns.to(tl.int64)[None, :] * col
    return tl.load(places, mask=(columns < N)[None, :], other=0) if CUT else tl.load(places)


@triton.jit
def _expand_at(expand_ptr, first, N, rank, RANK: tl.constexpr):
    """64 columns of E from `first` on, [RANK, 64]."""
    r = tl.arange(0, RANK)
    columns = first + tl.arange(0, _BLOCK)
    places = expand_ptr + r.to(tl.int64)[:, None] * N + columns[None, :]
    return tl.load(places, mask=(r < rank)[:, None] & (columns < N)[None, :], other=0)


@triton.jit
def _rest_at(
    start, z, expand_ptr, first, N, rank, col,
    CUT: tl.constexpr, RANK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """64 columns of x − z E in float32; those of x itself without a subspace."""
    x = _columns_at(start, first, N, col, CUT)
    if RANK > 0:
        e = _expand_at(expand_ptr, first, N, rank, RANK).to(tl.float32)
        x = x.to(tl.float32) - tl.dot(z, e, input_precision=EXACT)
    return x


@triton.jit
def _store_slots(
    numbers, low, high, unit, step, words, row_ok, lower, upper, first, columns,
    BITS: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Round low·unit / step and high·unit / step at random, and store them; their squares.

    `numbers` are the starts of rows, `first` the column that the tile begins with, and `lower` and
    `upper` the columns of its slots. With CUT it has `columns` of them. Zeros are stored where the
    step is not finite.
    """
    factor = tl.div_rn(1.0, step) * unit
    low_bits, low = rounded_at_random(low * factor, words & 0xFFFF, BITS)
    high_bits, high = rounded_at_random(high * factor, words >> 16, BITS)
    is_finite = step < float("inf")
    wanted = row_ok[:, None]
    if BITS == 4:
        packed = tl.where(is_finite, low_bits | (high_bits << 4), 0).to(tl.uint8)
        slots = tl.arange(0, SLOTS)
        mask = wanted & (lower < columns)[None, :] if CUT else wanted
        tl.store(numbers[:, None] + (first // 2 + slots)[None, :], packed, mask=mask)
    else:
        low_bits = tl.where(is_finite, low_bits ^ 128, 0).to(tl.uint8)
        high_bits = tl.where(is_finite, high_bits ^ 128, 0).to(tl.uint8)
        mask = wanted & (lower < columns)[None, :] if CUT else wanted
        tl.store(numbers[:, None] + (first + lower)[None, :], low_bits, mask=mask)
        mask = wanted & (upper < columns)[None, :] if CUT else wanted
        tl.store(numbers[:, None] + (first + upper)[None, :], high_bits, mask=mask)
    return step * step * (low * low + high * high)


@triton.jit
def _store_tail(
    numbers, scales, value, row_ok, key, place, block, first, T,
    BITS: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """The last T columns, fewer than 64, as `round_kernel` stores others; their squares.

    One that is not finite makes all of their blocks NaN. `block` is the number of the first one in
    its row, and `place` its place.
    """
    lower, upper, index, width = columns_of_slots(T)
    k = tl.arange(0, _BLOCK)[:, None]
    lower_signs = hadamard_signs(k, lower[None, :], T).to(tl.float16)
    upper_signs = hadamard_signs(k, upper[None, :], T).to(tl.float16)
    low, high, unit = rotated(value, lower_signs, upper_signs)
    unit = unit[:, None] * root_of(width)[None, :]
    sizes = tl.maximum(tl.abs(low), tl.abs(high)) * unit
    step = tl.full(sizes.shape, 1.0, tl.float32)
    before = tl.zeros(width.shape, tl.int32)  # blocks of the tail before a slot's
    count = 0
    for bit in tl.static_range(6):
        exists = (T >> (5 - bit)) & 1
        mine = width == (32 >> bit)
        largest = tl.max(tl.where(mine[None, :], sizes, 0), 1)
        scale, own = scale_above(largest, MOST)
        tl.store(scales + block + count, scale, mask=row_ok & (exists == 1))
        step = tl.where(mine[None, :], own[:, None], step)
        before = tl.where(mine, count, before)
        count += exists
    places = place[:, None] + before[None, :]
    words = word_at(key, places, index[None, :])
    return _store_slots(
        numbers, low, high, unit, step, words, row_ok, lower, upper, first, T, BITS, True
    )


@triton.jit(do_not_specialize=["M", "seed"])
def round_kernel(
    x_ptr, expand_ptr, z_ptr, numbers_ptr, scales_ptr, norms_ptr, seed, M, N, rank, inverse, x_row,
    x_col, numbers_row, blocks,
    BITS: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr, RANK: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Numbers, scales and norms of ROWS rows of X − Z E, and Z = X Eᵀ·inverse.

    TAIL says that blocks of 64 columns do not fill a row. EXACT is a precision in which products of
    bfloat16 numbers are exact.
    """
    MOST: tl.constexpr = (1 << (BITS - 1)) - 1
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # Rows beyond the last are loaded from the last one, which takes no masks, and not stored.
    row_ok = rows < M
    start = x_ptr + tl.minimum(rows, M - 1).to(tl.int64) * x_row
    numbers = numbers_ptr + rows.to(tl.int64) * numbers_row
    scales = scales_ptr + rows.to(tl.int64) * blocks
    place = rows.to(tl.int64) * blocks
    key = value_of(seed)
    whole = N // _BLOCK * _BLOCK
    z = None
    if RANK > 0:
        z = tl.zeros((ROWS, RANK), tl.float32)
        for first in range(0, whole, _BLOCK):
            x = _columns_at(start, first, N, x_col, False)
            e = _expand_at(expand_ptr, first, N, rank, RANK).to(x.dtype)
            z = tl.dot(x, e.T, z, input_precision=EXACT)
        if TAIL:
            x = _columns_at(start, whole, N, x_col, True)
            e = _expand_at(expand_ptr, whole, N, rank, RANK).to(x.dtype)
            z = tl.dot(x, e.T, z, input_precision=EXACT)
        kept = (z * inverse).to(tl.bfloat16)
        r = tl.arange(0, RANK)
        z_places = z_ptr + rows.to(tl.int64)[:, None] * rank + r[None, :]
        tl.store(z_places, kept, mask=row_ok[:, None] & (r < rank)[None, :])
        z = kept.to(tl.float32)

    lower = tl.arange(0, SLOTS)
    upper = lower + SLOTS
    k = tl.arange(0, _BLOCK)[:, None]
    lower_signs = hadamard_signs(k, lower[None, :], _BLOCK).to(tl.float16)
    upper_signs = hadamard_signs(k, upper[None, :], _BLOCK).to(tl.float16)
    squares = tl.zeros((ROWS, SLOTS), tl.float32)
    for block in range(0, whole // _BLOCK):
        first = block * _BLOCK
        value = _rest_at(start, z, expand_ptr, first, N, rank, x_col, False, RANK, EXACT)
        low, high, unit = rotated(value, lower_signs, upper_signs)
        unit *= 0.125  # 1/√64
        largest = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 1) * unit
        scale, step = scale_above(largest, MOST)
        tl.store(scales + block, scale, mask=row_ok)
        words = words_of_block(key, place + block)
        squares += _store_slots(
            numbers, low, high, unit[:, None], step[:, None], words, row_ok, lower, upper, first,
            _BLOCK, BITS, False,
        )  # fmt: skip
    if TAIL:
        block = whole // _BLOCK
        value = _rest_at(start, z, expand_ptr, whole, N, rank, x_col, True, RANK, EXACT)
        squares += _store_tail(
            numbers, scales, value, row_ok, key, place + block, block, whole,
            N - whole, BITS, MOST,
        )  # fmt: skip
    tl.store(norms_ptr + rows, tl.sqrt(tl.sum(squares, 1)), mask=row_ok)


@triton.jit
def _numbers_at(start, first, lower, upper, wanted, BITS: tl.constexpr):
    """Both numbers of each slot, as float16."""
    if BITS == 4:
        slots = tl.arange(0, SLOTS)
        packed = tl.load(start[:, None] + (first // 2 + slots)[None, :], mask=wanted, other=0)
        low = (packed & 15).to(tl.int8) - 8
        high = (packed >> 4).to(tl.int8) - 8
    else:
        low = tl.load(start[:, None] + (first + lower)[None, :], mask=wanted, other=0)
        high_wanted = wanted & (upper < NO_COLUMN)[None, :]
        high = tl.load(start[:, None] + (first + upper)[None, :], mask=high_wanted, other=0)
        low = low.to(tl.int8, bitcast=True)
        high = high.to(tl.int8, bitcast=True)
    return low.to(tl.float16), high.to(tl.float16)


@triton.jit
def _unrotated(
    numbers, z, expand_ptr, factor, lower_signs, upper_signs, lower, upper, wanted, first, N, rank,
    BITS: tl.constexpr, RANK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Products of stored numbers with signs ([32, 64]), times `factor`, plus z E: [ROWS, 64]."""
    low, high = _numbers_at(numbers, first, lower, upper, wanted, BITS)
    value = tl.dot(high, upper_signs, tl.dot(low, lower_signs)) * factor
    if RANK > 0:
        e = _expand_at(expand_ptr, first, N, rank, RANK).to(tl.float32)
        value = tl.dot(z, e, value, input_precision=EXACT)
    return value


@triton.jit
def _restore_tile(
    numbers_ptr, scales_ptr, z_ptr, expand_ptr, out_ptr, rows, exists, place, wanted, tile, N, rank,
    numbers_row, blocks,
    BITS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr, RANK: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of these rows of X, zeros for rows that do not exist."""
    numbers = numbers_ptr + rows.to(tl.int64) * numbers_row
    scales = scales_ptr + rows.to(tl.int64) * blocks
    out = out_ptr + place.to(tl.int64) * N
    z = None
    if RANK > 0:
        r = tl.arange(0, RANK)
        z_places = z_ptr + rows.to(tl.int64)[:, None] * rank + r[None, :]
        z = tl.load(z_places, mask=exists[:, None] & (r < rank)[None, :], other=0).to(tl.float32)
    whole = N // _BLOCK * _BLOCK
    columns = tl.arange(0, _BLOCK)
    lower = tl.arange(0, SLOTS)
    upper = lower + SLOTS
    lower_signs = hadamard_signs(columns[None, :], lower[:, None], _BLOCK).to(tl.float16)
    upper_signs = hadamard_signs(columns[None, :], upper[:, None], _BLOCK).to(tl.float16)
    for first in range(tile * COLUMNS, tl.minimum((tile + 1) * COLUMNS, whole), _BLOCK):
        step = tl.load(scales + first // _BLOCK, mask=exists, other=0).to(tl.float32)
        value = _unrotated(
            numbers, z, expand_ptr, (step * 0.125)[:, None], lower_signs, upper_signs, lower, upper,
            exists[:, None], first, N, rank, BITS, RANK, EXACT,
        )  # fmt: skip
        places = out[:, None] + (first + columns)[None, :]
        tl.store(places, value.to(out_ptr.dtype.element_ty), mask=wanted[:, None])
    if TAIL and whole // COLUMNS == tile:
        T = N - whole
        lower, upper, _, _ = columns_of_slots(T)
        lower_signs = hadamard_signs(columns[None, :], lower[:, None], T).to(tl.float16)
        upper_signs = hadamard_signs(columns[None, :], upper[:, None], T).to(tl.float16)
        width = tl.maximum(highest_bit(columns ^ T), 1)
        before = tl.zeros((_BLOCK,), tl.int32)  # blocks of the tail before a column's
        for bit in tl.static_range(6):
            before += tl.where(width < (32 >> bit), (T >> (5 - bit)) & 1, 0)
        is_inside = (columns < T)[None, :]
        steps = scales[:, None] + (whole // _BLOCK + before)[None, :]
        step = tl.load(steps, mask=exists[:, None] & is_inside, other=0).to(tl.float32)
        value = _unrotated(
            numbers, z, expand_ptr, step * root_of(width)[None, :], lower_signs, upper_signs,
            lower, upper, exists[:, None] & (lower < T)[None, :], whole, N, rank, BITS, RANK,
            EXACT,
        )  # fmt: skip
        places = out[:, None] + (whole + columns)[None, :]
        mask = wanted[:, None] & is_inside
        tl.store(places, value.to(out_ptr.dtype.element_ty), mask=mask)


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


@triton.jit(do_not_specialize=["M", "K"])
def restore_kernel(
    numbers_ptr, scales_ptr, z_ptr, expand_ptr, x_ptr, index_ptr, g_ptr, weight_ptr, gathered_ptr,
    M, K, N, P, rank, numbers_row, blocks, g_row, g_col,
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
            numbers_ptr, scales_ptr, z_ptr, expand_ptr, x_ptr, rows, exists, place, wanted, tile, N,
            rank, numbers_row, blocks, BITS, COLUMNS, TAIL, RANK, EXACT,
        )  # fmt: skip
    else:
        _gather_tile(
            g_ptr, weight_ptr, gathered_ptr, rows, exists, place, wanted, tile - tiles_of_x, P,
            g_row, g_col, G_COLUMNS,
        )  # fmt: skip


def round_rows(
    x: Tensor,
    bits: int,
    seed: int | Tensor,
    expand: Tensor | None = None,
    scale: float = 1.0,
) -> Rounded:
    """X, or what a subspace leaves of it, in `bits` bits a number.

    A row with a number that is not finite has a norm and at least one scale of NaN.

    Args:
        x: [M, N], float16, bfloat16 or float32, any strides.
        bits: 4 or 8.
        seed: Of the draws, or int64 [1] on the device.
        expand: E = s Qᵀ, [q, N], bfloat16, contiguous, for Q with orthonormal columns; q ≤ 64.
        scale: s.
    """
    rows, columns = x.shape
    rank = 0 if expand is None else expand.shape[0]
    stored = Rounded(
        x.new_empty((rows, columns if bits == 8 else -(-columns // 2)), dtype=torch.uint8),
        x.new_empty((rows, columns // BLOCK + (columns % BLOCK).bit_count()), dtype=torch.bfloat16),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty((rows, rank), dtype=torch.bfloat16) if rank else None,
    )
    launch.launch(
        round_kernel,
        (triton.cdiv(rows, ROUNDED_ROWS),),
        x_ptr=x, expand_ptr=expand, z_ptr=stored.z, numbers_ptr=stored.numbers,
        scales_ptr=stored.scales.view(torch.uint16), norms_ptr=stored.norms,
        seed=seed, M=rows, N=columns, rank=rank, inverse=scale**-2,
        x_row=x.stride(0), x_col=x.stride(1), numbers_row=stored.numbers.shape[1],
        blocks=stored.scales.shape[1],
        BITS=bits, ROWS=ROUNDED_ROWS, TAIL=columns % BLOCK > 0,
        RANK=padded_rank(rank) if rank else 0, EXACT=_exact(targets.current(x.device)),
        num_warps=ROUNDING_WARPS, num_stages=3,
    )  # fmt: skip
    return stored


def restore_rows(
    stored: tuple[Tensor, Tensor],
    bits: int,
    columns: int,
    dtype: torch.dtype,
    indices: Tensor | None = None,
    inside: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Rows that `round_rows` stored, [K, N]; all of them without indices.

    Args:
        stored: Numbers and scales.
        bits: Of the numbers.
        columns: N.
        dtype: Of the result: float16, bfloat16 or float32.
        indices: [K] integers, contiguous. Rows named from M on become zero.
        inside: Z ([M, q]) and E ([q, N]), bfloat16, contiguous, whose product is added.
    """
    return _restore(stored, bits, columns, dtype, indices, inside).x


def restore_both(
    stored: tuple[Tensor, Tensor],
    bits: int,
    columns: int,
    g: Tensor,
    indices: Tensor,
    weights: Tensor | None = None,
    inside: tuple[Tensor, Tensor] | None = None,
) -> Restored:
    """The selected rows of X and, weighted, of G: what a plain GEMM takes, in the dtype of G.

    Args:
        stored: Numbers and scales of X, as for `restore_rows`.
        bits: Of the numbers.
        columns: N.
        g: [M, P], float16, bfloat16 or float32, any strides.
        indices: [K] integers, contiguous. Rows named from M on become zero.
        weights: [K], floating point; the product is rounded once. 1 each if `None`.
        inside: As for `restore_rows`.
    """
    return _restore(stored, bits, columns, g.dtype, indices, inside, g, weights)


def _restore(
    stored: tuple[Tensor, Tensor],
    bits: int,
    columns: int,
    dtype: torch.dtype,
    indices: Tensor | None,
    inside: tuple[Tensor, Tensor] | None,
    g: Tensor | None = None,
    weights: Tensor | None = None,
) -> Restored:
    numbers, scales = stored
    rows = len(scales)
    k = rows if indices is None else indices.numel()
    p = 0 if g is None else g.shape[1]
    z, expand = inside or (None, None)
    rank = 0 if z is None else z.shape[1]
    restored = Restored(
        numbers.new_empty((k, columns), dtype=dtype), numbers.new_empty((k, p), dtype=dtype)
    )
    tiles = triton.cdiv(columns, RESTORED_COLUMNS) + triton.cdiv(p, GATHERED_COLUMNS)
    launch.launch(
        restore_kernel,
        (triton.cdiv(k, RESTORED_ROWS), tiles),
        numbers_ptr=numbers, scales_ptr=scales, z_ptr=z if rank else None,
        expand_ptr=expand if rank else None, x_ptr=restored.x, index_ptr=indices, g_ptr=g,
        weight_ptr=weights, gathered_ptr=restored.g if p else None,
        M=rows, K=k, N=columns, P=p, rank=rank, numbers_row=numbers.shape[1],
        blocks=scales.shape[1],
        g_row=0 if g is None else g.stride(0), g_col=0 if g is None else g.stride(1),
        BITS=bits, ROWS=RESTORED_ROWS, COLUMNS=RESTORED_COLUMNS, G_COLUMNS=GATHERED_COLUMNS,
        TAIL=columns % BLOCK > 0, RANK=padded_rank(rank) if rank else 0,
        EXACT=_exact(targets.current(numbers.device)),
        num_warps=RESTORING_WARPS, num_stages=3,
    )  # fmt: skip
    return restored


def _exact(target: Target) -> str:
    """The fastest precision in which products of bfloat16 numbers held as float32 are exact."""
    return "tf32" if target.has_tf32 else "ieee"
