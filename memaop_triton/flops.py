"""Floating-point operations of gradients, and the rows and ranks that fit a budget of them.

A multiplication and an addition are two operations, as in PyTorch's counter. Everything that grows
with the operands counts: products, norms, and a subspace's refreshes, divided by the steps between
them. Operations on one number per row (scores, draws, selection) do not count.
"""

from __future__ import annotations

import bisect
import functools
import math
from typing import NamedTuple

#: The largest rank of a subspace that the Triton kernels take.
MAX_RANK = 64
#: Ranks within a budget are multiples of it: kernels compute several columns at once.
RANK_STEP = 4
#: Refreshes of a subspace between two choices of its side and rank.
REFRESHES_PER_CHOICE = 4
#: Columns of the blocks that `scores="columns"` reads: 128 bytes in half precision, as much as a
#: line of a GPU's cache holds.
SCORED_BLOCK = 64
_SCORED_SHARE = 8
# Rows that a power iteration reads, about; more only where its rank needs them.
_ROWS_PER_REFRESH = 1024
_ROWS_PER_DIMENSION = 16
# The largest part of a budget that the subspace may take (docs/quality.md).
_MAX_SUBSPACE_SHARE = 0.6


class SubspaceCost(NamedTuple):
    """What the cost of a subspace memory depends on.

    Attributes:
        rank: Dimension in use.
        features: Length of the rows it is a subspace of, N for X and P for G.
        refresh_every: Steps between two power iterations.
        kept: Numbers in the bases among which it chooses, 0 if there is no choice.
    """

    rank: int
    features: int
    refresh_every: int
    kept: int


def weight_grad_flops(
    m: int,
    n: int,
    p: int,
    k: int,
    subspace: SubspaceCost | None = None,
    scored: int | None = None,
) -> int:
    """Operations of dW from `k` of `m` rows of `n` inputs and `p` outputs; dense at `k >= m`.

    A row's score takes `scored` of its numbers, all if `None`.
    """
    if k >= m:
        return 2 * m * n * p
    flops = 2 * k * n * p + 2 * m * (n + p if scored is None else scored)
    return flops if subspace is None else flops + round(_subspace_flops(m, n, p, k, subspace))


def columns_read(features: int) -> int:
    """How many columns `"columns"` reads of rows of this length.

    The number of blocks next to an eighth, at least one; all columns of rows below two blocks.
    """
    if features < 2 * SCORED_BLOCK:
        return features
    return SCORED_BLOCK * max(1, round(features / (SCORED_BLOCK * _SCORED_SHARE)))


def numbers_read(scores: str, in_features: int, out_features: int) -> int:
    """How many numbers the score of one row reads, of N + P."""
    if scores == "grad":
        return out_features
    if scores == "columns":
        return columns_read(in_features) + columns_read(out_features)
    return in_features + out_features


def input_grad_flops(m: int, n: int, p: int, k: int, subspace: SubspaceCost | None = None) -> int:
    """Operations of dX from `k` of `m` rows; dense at `k >= m`.

    Without a subspace the rows are those of dW, whose scores count there.
    """
    if k >= m or subspace is None:
        return 2 * min(k, m) * n * p
    return 2 * k * n * p + 2 * m * p + round(_subspace_flops(m, n, p, k, subspace))


def projected_input_grad_flops(m: int, n: int, p: int, rank: int, refresh_every: int) -> int:
    """Operations of dX = G (W Q) Qᵀ, a share of Q's refreshes included."""
    flops = 2 * rank * (m * (n + p) + n * p)
    # A power iteration goes through G and W; orthonormal columns of [N, rank] count as below.
    refresh = 2 * rank * p * (_rows_read(m, rank) + n) + 4 * rank * rank * n
    return flops + round(refresh / refresh_every)


@functools.lru_cache(maxsize=1024)
def projection_rank_within(budget: float, m: int, n: int, p: int, refresh_every: int) -> int:
    """The largest rank of a projected dX within a budget, at least 1 and at most `n`.

    The budget is a fraction of dense's 2 M N P operations, here and below.
    """

    def costs_too_much(rank: int) -> bool:
        return projected_input_grad_flops(m, n, p, rank, refresh_every) > budget * 2 * m * n * p

    # The cost grows with the rank.
    most = bisect.bisect_left(range(1, n + 1), True, key=costs_too_much)
    steps = most // RANK_STEP * RANK_STEP
    return max(1, steps or most)


def refresh_stride(m: int, rank: int) -> int:
    """Of `m` rows, every how many-th one a power iteration of this rank reads.

    Odd, and a larger one has no divisor in common with the usual sizes of images, so that no
    position of sequences or images of equal size is left out every time.
    """
    stride = m // max(_ROWS_PER_REFRESH, _ROWS_PER_DIMENSION * rank) | 1
    while stride > 10 and math.gcd(stride, 3 * 5 * 7) > 1:
        stride -= 2
    return stride


def _subspace_flops(m: int, n: int, p: int, k: float, subspace: SubspaceCost) -> float:
    q, features, refresh_every, kept = subspace
    # Z, Zᵀ of the other side, the basis as q more rows of the product, and what it takes from the
    # selected rows.
    flops = 2.0 * q * (m * (n + p) + n * p + k * features)
    # A power iteration, and QR with its Q formed. The Triton kernels, which call no solver, take
    # four times as many operations as QR.
    read = _rows_read(m, q)
    flops += (2 * read + 4 * q) * q * features / refresh_every
    # A choice projects, iterates and projects again, on all that is kept.
    return flops + (6 * read + 4 * q) * kept / (refresh_every * REFRESHES_PER_CHOICE)


def _rows_read(m: int, rank: int) -> int:
    return -(-m // refresh_stride(m, rank))


def rank_within(
    budget: float, m: int, n: int, p: int, refresh_every: int, *, both_sides: bool
) -> int:
    """The largest rank that leaves enough of a budget for rows, 0 if none does.

    With `both_sides` X and G both have a basis, of which the memory chooses one.
    """
    longer = max(n, p)
    one = SubspaceCost(1, longer, refresh_every, n + p if both_sides else longer)
    paid = _MAX_SUBSPACE_SHARE * (budget * 2 * m * n * p - 2 * m * (n + p))
    steps = math.floor(paid / _subspace_flops(m, n, p, 0, one) / RANK_STEP)
    return min(max(0, steps) * RANK_STEP, MAX_RANK)


def rows_within(
    budget: float,
    m: int,
    n: int,
    p: int,
    subspace: SubspaceCost | None = None,
    scored: int | None = None,
) -> float:
    """Rows that fit a budget beside the norms and the subspace; may be below 1.

    A row's score takes `scored` of its numbers, all if `None`.
    """
    left = budget * 2 * m * n * p - 2 * m * (n + p if scored is None else scored)
    per_row = 2 * n * p
    if subspace is not None:
        left -= _subspace_flops(m, n, p, 0, subspace)
        per_row += 2 * subspace.rank * subspace.features
    return left / per_row
