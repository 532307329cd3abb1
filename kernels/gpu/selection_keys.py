"""What selection kernels are made of: units and their scores, draws, keys, digits, places, weights.

`select.py` says what a unit and a key are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memaop_triton.kernels.gpu.primitives import value_of

_INFINITE = tl.constexpr(0x7F800000)  # the bits of +Inf


@triton.jit
def unit_scores(scores_ptr, units, inside, M, BLOCK_ROWS: tl.constexpr):
    """Sums of the scores of each unit's rows; +Inf for what is not finite. All 1 without scores."""
    if scores_ptr is None:
        score = tl.full(units.shape, 1.0, tl.float32)
    elif BLOCK_ROWS == 1:
        score = tl.load(scores_ptr + units, mask=inside, other=0)
    else:
        rows = units[:, None] * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
        score = tl.sum(tl.load(scores_ptr + rows, mask=inside[:, None] & (rows < M), other=0), 1)
    return tl.where(score < float("inf"), score, float("inf"))


@triton.jit
def random_words(seed, first, CHUNK: tl.constexpr):
    """A random word of 32 bits for each of CHUNK units from `first` on, a multiple of 4."""
    a, b, c, d = tl.randint4x(value_of(seed), first // 4 + tl.arange(0, CHUNK // 4))
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d)).to(tl.uint32, bitcast=True)


@triton.jit
def probabilities(score, slope):
    """p = min(1, λs), 0 for a score of 0."""
    return tl.where(score > 0, tl.minimum(score * slope, 1), 0)


@triton.jit
def keys_of(score, words, slope, POLICY: tl.constexpr):
    """Bits of the keys, int32 and not negative."""
    u = ((words >> 8).to(tl.int32) + 1).to(tl.float32) * 5.9604644775390625e-08  # 2⁻²⁴: (0, 1]
    if POLICY == "topk":
        key = score
    elif POLICY == "priority":
        key = tl.div_rn(score, u)
    elif POLICY == "weightedk":
        key = tl.div_rn(score, tl.sqrt_rn(tl.maximum(-tl.log(u), 1.4901161193847656e-08)))
    elif POLICY == "bernoulli":
        p = probabilities(score, slope)
        key = tl.where(u <= p, tl.div_rn(u, p), 0)
    else:
        key = u
    bits = key.to(tl.int32, bitcast=True)
    return tl.where(score == float("inf"), _INFINITE, bits)


@triton.jit
def count_digits(keys, inside, prefix, SHIFT: tl.constexpr):
    """Counts, [256], of the next 8 bits below those that agree with `prefix`."""
    agrees = inside
    if SHIFT < 24:
        agrees = agrees & ((keys >> (SHIFT + 8)) == prefix)
    return tl.histogram((keys >> SHIFT) & 255, 256, mask=agrees)


@triton.jit
def descend(counts, prefix, wanted):
    """The digit after `prefix` in which the `wanted`-th largest key lies, and its rank in there."""
    at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts  # [256] keys of this digit or more
    digit = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(tl.arange(0, 256) > digit, counts, 0), 0)
    return prefix * 256 + digit, wanted - above


@triton.jit
def weights_of(score, keys, threshold, slope, surplus, same, POLICY: tl.constexpr):
    """Of priority max(1, τ/s), of bernoulli 1/p for what was drawn, of others one for all units."""
    if POLICY == "priority":
        ratio = tl.div_rn(threshold, score)
        weight = tl.where(score > 0, tl.where(ratio > 1, ratio, 1), 0)
    elif POLICY == "bernoulli":
        weight = tl.where(keys > 0, tl.div_rn(surplus, probabilities(score, slope)), 0)
    else:
        weight = tl.zeros(score.shape, tl.float32) + same
    if POLICY == "priority" or POLICY == "bernoulli":
        weight = tl.where(score == float("inf"), 1, weight)
    return weight


@triton.jit
def places_of(keys, threshold, above, equal, quota):
    """Where each unit of a chunk goes and whether it is taken, and the chunk's counts.

    `above` and `equal` are the numbers of units before the chunk with keys above and at the
    threshold, of which `quota` are taken. The counts of a chunk share one prefix sum: 16 bits each.
    """
    is_above = (keys > threshold).to(tl.int32)
    is_equal = (keys == threshold).to(tl.int32)
    both = is_above + (is_equal << 16)
    before = tl.cumsum(both, 0) - both
    total = tl.sum(both, 0)
    equal_before = equal + (before >> 16)
    place = above + (before & 0xFFFF) + tl.minimum(equal_before, quota)
    taken = (is_above == 1) | ((is_equal == 1) & (equal_before < quota))
    return place, taken, total & 0xFFFF, total >> 16


@triton.jit
def store_units(
    units, inside, place, taken, weight, M, indices_ptr, weights_ptr, factors_ptr, filled_ptr,
    taken_ptr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """The rows of each unit that is taken, its weight for each of them, and the rows' flags."""
    if BLOCK_ROWS == 1:
        rows = units
        places = place
        row_taken = taken
        exists = inside
        weights = weight
    else:
        row = tl.arange(0, BLOCK_ROWS)[None, :]
        rows = units[:, None] * BLOCK_ROWS + row
        places = place[:, None] * BLOCK_ROWS + row
        row_taken = taken[:, None] & (row >= 0)
        exists = inside[:, None] & (rows < M)
        weights = tl.broadcast_to(weight[:, None], rows.shape)
    tl.store(indices_ptr + places, rows.to(tl.int64), mask=row_taken)
    tl.store(weights_ptr + places, weights, mask=row_taken)
    if factors_ptr is not None:
        tl.store(factors_ptr + places, weights.to(factors_ptr.dtype.element_ty), mask=row_taken)
    if filled_ptr is not None:
        tl.store(filled_ptr + rows, tl.zeros(rows.shape, tl.int8), mask=row_taken & exists)
    if taken_ptr is not None:
        tl.store(taken_ptr + rows, row_taken.to(tl.int8), mask=exists)


@triton.jit
def draw_chunk(
    scores_ptr, keys_ptr, seed, first, slope, units, M,
    POLICY: tl.constexpr, BLOCK_ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Keys of CHUNK units from `first` on, also stored, and which of these there are."""
    each = first + tl.arange(0, CHUNK)
    inside = each < units
    score = unit_scores(scores_ptr, each, inside, M, BLOCK_ROWS)
    keys = keys_of(score, random_words(seed, first, CHUNK), slope, POLICY)
    tl.store(keys_ptr + each, keys, mask=inside)
    return keys, inside
