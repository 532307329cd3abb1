"""What the stash's kernels are made of: a row's blocks, their rotation, and their dither.

Hadamard's matrix of 64 columns is that of 32 four times, the last time negative: of the products a
and b of a block's halves with the smaller one, those of the block are a + b and a - b. What blocks
of 64 leave of a row is the block of 32, then the narrower ones. T ≤ 32 columns hold blocks as wide
as the powers of two that T is the sum of, the widest first. Column c, below T, is in the block as
wide as the highest bit in which c and T differ, at the place that the bits of c below say.

Half as many slots have a column of the lower half of a block and one of its upper half each: two
numbers that one byte of 4 bits each holds, and one random word rounds. A block of one column has no
upper half.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memaop_triton.kernels.targets import Target

WIDEST = 64  # columns of a block
BLOCK = tl.constexpr(WIDEST)
HALF = tl.constexpr(WIDEST // 2)  # columns of a tile that is rotated
NO_COLUMN = tl.constexpr(WIDEST // 2)

_LEAST_SCALE = tl.constexpr(2.0**-120)  # below, the reciprocal of a scale has no finite value
_HALF_OF_LARGEST = tl.constexpr(float.fromhex("0x1.fffffep+126"))


def exact(target: Target) -> str:
    """The fastest precision in which products of bfloat16 numbers held as float32 are exact."""
    return "tf32" if target.has_tf32 else "ieee"


@triton.jit
def highest_bit(number):
    """The largest power of two in numbers below 128; 0 for 0."""
    bits = number | (number >> 1)
    bits |= bits >> 2
    bits |= bits >> 4
    return bits - (bits >> 1)


@triton.jit
def columns_of_slots(T):
    """Columns of the lower and the upper half, places in the half, and widths, of 16 slots.

    `NO_COLUMN` where there is none.
    """
    slot = tl.arange(0, HALF // 2)
    half = highest_bit(slot ^ (T >> 1))
    place = tl.where(half > 0, slot & (half - 1), 0)
    lower = 2 * slot - place
    upper = tl.where(slot < (T >> 1), lower + half, NO_COLUMN)
    return tl.where(lower < T, lower, NO_COLUMN), upper, place, tl.maximum(2 * half, 1)


@triton.jit
def end_of_row(N, part):
    """First column and number of columns of the two tiles after the whole blocks of a row."""
    left = N % BLOCK
    wide = left & HALF
    return N - left + part * wide, tl.where(part == 0, wide, left - wide)


@triton.jit
def columns_at(start, first, end, col, TILE: tl.constexpr, CUT: tl.constexpr):
    """TILE columns of rows that begin at `start`; with CUT those from `end` on are zero."""
    columns = first + tl.arange(0, TILE)
    places = start[:, None] + columns.to(tl.int64)[None, :] * col
    return tl.load(places, mask=(columns < end)[None, :], other=0) if CUT else tl.load(places)


@triton.jit
def expand_at(
    expand_ptr, first, end, row, rank, TILE: tl.constexpr, CUT: tl.constexpr, RANK: tl.constexpr
):
    """TILE columns of E, whose rows are `row` apart, [RANK, TILE]; with CUT zero from `end` on."""
    r = tl.arange(0, RANK)[:, None]
    columns = first + tl.arange(0, TILE)[None, :]
    wanted = (r < rank) & (columns < end) if CUT else r < rank
    return tl.load(expand_ptr + r.to(tl.int64) * row + columns, mask=wanted, other=0)


@triton.jit
def hadamard_signs(rows, columns, T):
    """±1 where a row and a column of a Hadamard matrix belong to one block, 0 elsewhere (int32)."""
    width = highest_bit(columns ^ T)
    is_inside = (rows < T) & (columns < T) & (highest_bit(rows ^ T) == width)
    common = rows & columns & (width - 1)
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    return tl.where(is_inside, 1 - 2 * (common & 1), 0)


@triton.jit
def root_of(width):
    """1/√width of a power of two (float32)."""
    return tl.div_rn(1.0, tl.sqrt_rn(width.to(tl.float32)))


@triton.jit
def rotated(value, signs):
    """The product of `value` ([R, 32]) with signs ([32, S], float16), in float32.

    Numbers of 16 bits have exact products with signs. float32 is divided by a power of two near the
    row's largest number, and two float16 numbers then hold what float32 has beside that one.
    """
    if value.dtype == tl.float32:
        largest = tl.minimum(tl.maximum(tl.max(tl.abs(value), 1), 2.0**-100), 2.0**126)
        exponent = largest.to(tl.uint32, bitcast=True) & 0x7F800000
        # Up to 2⁸ or 2⁹: the lower number is then none that float16 has few bits for.
        scaled = value * ((262 << 23) - exponent).to(tl.float32, bitcast=True)[:, None]
        upper = scaled.to(tl.float16)
        lower = (scaled - upper.to(tl.float32)).to(tl.float16)
        unit = (exponent - (8 << 23)).to(tl.float32, bitcast=True)
        product = tl.dot(upper, signs, tl.dot(lower, signs)) * unit[:, None]
    else:
        product = tl.dot(value, signs.to(value.dtype))
    return product


@triton.jit
def scale_above(largest, MOST: tl.constexpr):
    """Bits of the bfloat16 scale at which `largest` is at most MOST, and the scale as float32.

    It is at least largest / MOST, and at most a 128th more; NaN if that is not finite.
    """
    least = tl.div_rn(largest, MOST * 1.0)
    bits = tl.maximum(least, _LEAST_SCALE).to(tl.uint32, bitcast=True)
    bits = tl.where(least <= _HALF_OF_LARGEST, (bits + 0xFFFF) >> 16, 0x7FC0)
    return bits.to(tl.uint16), (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def dither_of(noise):
    """u from (0, 1) (float32), by 16 random bits: the middles of 2¹⁶ equal parts."""
    return ((noise << 7) | 0x3F800000).to(tl.float32, bitcast=True) - (1 - 2.0**-17)


@triton.jit
def dithered(value, noise, BITS: tl.constexpr):
    """⌊value + u⌋, and what that is restored to, ⌊value + u⌋ + ½ − u.

    The first is returned plus 2ᵇ⁻¹ (uint32, b bits), the second is float32. A sum in [2ᵇ, 2ᵇ⁺¹) has
    its integer part in the first b bits of its mantissa. To convert it would take units of which a
    processor has few.
    """
    ZERO: tl.constexpr = (1 << BITS) + (1 << (BITS - 1))
    BELOW: tl.constexpr = 23 - BITS
    u = dither_of(noise)
    # A number that was 2ᵇ⁻¹ − 1 but for an error of float32 is not to become the next one.
    total = tl.minimum(value + (u + ZERO), (2 << BITS) - 2.0**-BELOW)
    bits = total.to(tl.uint32, bitcast=True) >> BELOW
    number = (bits << BELOW).to(tl.float32, bitcast=True) - ZERO
    return bits & ((1 << BITS) - 1), number + (0.5 - u)


@triton.jit
def words_of_block(seed, place):
    """The 32 random words of the blocks at these places (int64 [R]): uint32 [R, 32]."""
    counter = (8 * place).to(tl.uint32)[:, None] + tl.arange(0, 8).to(tl.uint32)[None, :]
    a, b, c, d = tl.randint4x(seed, counter)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return words.to(tl.uint32, bitcast=True)


@triton.jit
def word_at(seed, place, index):
    """One of the 32 random words of the block at each place, by its number: uint32."""
    a, b, c, d = tl.randint4x(seed, (8 * place + (index >> 2)).to(tl.uint32))
    even = tl.where(index & 2 == 0, a, c)
    odd = tl.where(index & 2 == 0, b, d)
    return tl.where(index & 1 == 0, even, odd).to(tl.uint32, bitcast=True)
