"""Rows in 4 or 8 bits a number, on a GPU: rounded in one launch. `stash_restore.py` restores them.

`kernels/cpu/stash.py` says what is stored. A program owns rows of X, [M, N], and walks over their
columns, 64 at a time, whose product with their Hadamard matrix is one for the matrix units. Beside
a subspace it does so twice, first for z = x Eᵀ / s² (E = s Qᵀ, [q, N]) and then for x − z E: the
second time the rows come from the cache.

Numbers are drawn from a seed and the place of a block, as in C: the same seed stores the same bits,
but where sums of float32 that are rounded in another order lie on two sides of a draw.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memaop_triton.kernels import targets
from memaop_triton.kernels.gpu import launch
from memaop_triton.kernels.gpu.primitives import is_aligned, value_of
from memaop_triton.kernels.gpu.stash_blocks import (
    BLOCK,
    HALF,
    NO_COLUMN,
    WIDEST,
    columns_at,
    columns_of_slots,
    dithered,
    end_of_row,
    exact,
    expand_at,
    hadamard_signs,
    root_of,
    rotated,
    scale_above,
    word_at,
    words_of_block,
)
from memaop_triton.kernels.tuning.config import padded_rank

# Of a program: 16 rows for each warp, so that the matrix units give none of them the same numbers.
ROWS, WARPS = 32, 2
# Narrow copies and blocks take registers, of which more warps have more.
WARPS_OF_OTHERS = 8


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


@triton.jit
def _rest_at(
    start, z, expand_ptr, first, end, e_row, rank, col,
    TILE: tl.constexpr, CUT: tl.constexpr, RANK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """TILE columns of x − z E in float32; those of x itself without a subspace."""
    x = columns_at(start, first, end, col, TILE, CUT)
    if RANK > 0:
        e = expand_at(expand_ptr, first, end, e_row, rank, TILE, CUT, RANK).to(tl.float32)
        x = x.to(tl.float32) - tl.dot(z, e, input_precision=EXACT)
    return x


@triton.jit
def _store_slots(
    numbers, low, high, step, words, row_ok, lower, upper, first,
    BITS: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Round low / step and high / step, dithered, and store them; their squares once restored.

    `numbers` are the starts of rows, `first` the column that the tile begins with, `lower` and
    `upper` the columns of its slots; with CUT there are some without. Zeros are stored where the
    step is not finite.
    """
    inverse = tl.div_rn(1.0, step)
    low_bits, low = dithered(low * inverse, words & 0xFFFF, BITS)
    high_bits, high = dithered(high * inverse, words >> 16, BITS)
    is_finite = step < float("inf")
    has_lower = row_ok[:, None]
    has_upper = has_lower
    if CUT:
        has_upper = has_lower & (upper != NO_COLUMN)[None, :]
        has_lower = has_lower & (lower != NO_COLUMN)[None, :]
        low = tl.where(has_lower, low, 0)
        high = tl.where(has_upper, high, 0)
    if BITS == 4:
        slots = first // 2 + tl.arange(0, low.shape[1])
        packed = tl.where(is_finite, low_bits | (high_bits << 4), 0).to(tl.uint8)
        tl.store(numbers[:, None] + slots[None, :], packed, mask=has_lower)
    else:
        low_bits = tl.where(is_finite, low_bits ^ 128, 0).to(tl.uint8)
        tl.store(numbers[:, None] + (first + lower)[None, :], low_bits, mask=has_lower)
        high_bits = tl.where(is_finite, high_bits ^ 128, 0).to(tl.uint8)
        tl.store(numbers[:, None] + (first + upper)[None, :], high_bits, mask=has_upper)
    return step * step * (low * low + high * high)


@triton.jit
def _store_narrow(
    numbers, scales, value, row_ok, key, place, first, T, BITS: tl.constexpr, MOST: tl.constexpr
):
    """The last T columns of a row, or those before them, in narrow blocks; sums of their squares.

    A number that is not finite makes all of these blocks NaN. `scales` is where the scale of the
    first one goes, and `place` its place.
    """
    lower, upper, index, width = columns_of_slots(T)
    k = tl.arange(0, HALF)[:, None]
    lower_signs = hadamard_signs(k, lower[None, :], T).to(tl.float16)
    upper_signs = hadamard_signs(k, upper[None, :], T).to(tl.float16)
    root = root_of(width)[None, :]
    low = rotated(value, lower_signs) * root
    high = rotated(value, upper_signs) * root
    sizes = tl.maximum(tl.abs(low), tl.abs(high))
    sizes = tl.where(sizes < float("inf"), sizes, float("inf"))  # `tl.max` passes over NaN
    step = tl.full(sizes.shape, 1.0, tl.float32)
    before = tl.zeros(width.shape, tl.int32)  # blocks of the tile before a slot's
    count = 0
    widths = tl.full(row_ok.shape, 0, tl.int32) + T  # a mask that is one number is not taken
    for bit in tl.static_range(6):
        exists = (widths & (32 >> bit)) != 0
        mine = width == (32 >> bit)
        largest = tl.max(tl.where(mine[None, :], sizes, 0), 1)
        scale, own = scale_above(largest, MOST)
        tl.store(scales + count, scale, mask=row_ok & exists)
        step = tl.where(mine[None, :], own[:, None], step)
        before = tl.where(mine, count, before)
        count += (T >> (5 - bit)) & 1
    words = word_at(key, place[:, None] + before[None, :], index[None, :])
    squares = _store_slots(numbers, low, high, step, words, row_ok, lower, upper, first, BITS, True)
    return tl.sum(squares, 1)


@triton.jit(do_not_specialize=["M", "seed"])
def stash_kernel(
    x_ptr, expand_ptr, z_ptr, numbers_ptr, scales_ptr, norms_ptr, seed, M, N, rank, inverse, x_row,
    x_col, e_row, numbers_row, blocks,
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
    z = None
    if RANK > 0:
        z = tl.zeros((ROWS, RANK), tl.float32)
        for block in range(0, N // BLOCK):
            x = columns_at(start, block * BLOCK, N, x_col, BLOCK, False)
            e = expand_at(expand_ptr, block * BLOCK, N, e_row, rank, BLOCK, False, RANK).to(x.dtype)
            z = tl.dot(x, e.T, z, input_precision=EXACT)
        if TAIL:
            for part in range(0, 2):
                first, T = end_of_row(N, part)
                x = columns_at(start, first, first + T, x_col, HALF, True)
                e = expand_at(expand_ptr, first, first + T, e_row, rank, HALF, True, RANK)
                e = e.to(x.dtype)
                z = tl.dot(x, e.T, z, input_precision=EXACT)
        kept = (z * inverse).to(tl.bfloat16)
        r = tl.arange(0, RANK)
        z_places = z_ptr + rows.to(tl.int64)[:, None] * rank + r[None, :]
        tl.store(z_places, kept, mask=row_ok[:, None] & (r < rank)[None, :])
        z = kept.to(tl.float32)

    lower = tl.arange(0, HALF)
    upper = lower + HALF
    signs = hadamard_signs(lower[:, None], lower[None, :], HALF).to(tl.float16)
    squares = tl.zeros((ROWS, HALF), tl.float32)
    for block in range(0, N // BLOCK):
        first = block * BLOCK
        left = _rest_at(
            start, z, expand_ptr, first, N, e_row, rank, x_col, HALF, False, RANK, EXACT
        )
        left = rotated(left, signs)
        right = _rest_at(
            start, z, expand_ptr, first + HALF, N, e_row, rank, x_col, HALF, False, RANK, EXACT
        )
        right = rotated(right, signs)
        low = (left + right) * 0.125  # 1/√64
        high = (left - right) * 0.125
        scale, step = scale_above(tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 1), MOST)
        tl.store(scales + block, scale, mask=row_ok)
        words = words_of_block(key, place + block)
        squares += _store_slots(
            numbers, low, high, step[:, None], words, row_ok, lower, upper, first, BITS, False
        )
    square = tl.sum(squares, 1)
    if TAIL:
        block = N // BLOCK
        for part in range(0, 2):
            first, T = end_of_row(N, part)
            value = _rest_at(
                start, z, expand_ptr, first, first + T, e_row, rank, x_col, HALF, True, RANK, EXACT
            )
            square += _store_narrow(
                numbers, scales + block, value, row_ok, key, place + block, first, T, BITS, MOST
            )
            block += T >> 5
    tl.store(norms_ptr + rows, tl.sqrt(square), mask=row_ok)


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
        expand: E = s Qᵀ, [q, N], bfloat16, rows of unit stride, for Q with orthonormal
            columns; q ≤ 64.
        scale: s.
    """
    rows, columns = x.shape
    rank = 0 if expand is None else expand.shape[0]
    row_bytes = columns if bits == 8 else -(-columns // 2)
    blocks = columns // WIDEST + (columns % WIDEST).bit_count()
    suits = columns % WIDEST == 0 and is_aligned(x)
    stored = Rounded(
        x.new_empty((rows, row_bytes), dtype=torch.uint8),
        x.new_empty((rows, blocks), dtype=torch.bfloat16),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty((rows, rank), dtype=torch.bfloat16) if rank else None,
    )
    launch.launch(
        stash_kernel,
        (triton.cdiv(rows, ROWS),),
        x_ptr=x, expand_ptr=expand, z_ptr=stored.z, numbers_ptr=stored.numbers,
        scales_ptr=stored.scales.view(torch.uint16), norms_ptr=stored.norms,
        seed=seed, M=rows, N=columns, rank=rank, inverse=scale**-2,
        x_row=x.stride(0), x_col=x.stride(1),
        e_row=0 if expand is None else expand.stride(0), numbers_row=row_bytes, blocks=blocks,
        BITS=bits, ROWS=ROWS, TAIL=columns % WIDEST > 0,
        RANK=padded_rank(rank) if rank else 0, EXACT=exact(targets.current(x.device)),
        num_warps=WARPS if suits else WARPS_OF_OTHERS, num_stages=3 if suits else 1,
    )  # fmt: skip
    return stored
