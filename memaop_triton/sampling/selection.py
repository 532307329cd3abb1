"""Selection policies: which K of M rows are computed, and with what weight.

Every policy is a handful of tensor operations of fixed shape on the device of the scores: no host
synchronisation, no data-dependent size. Draws without replacement are one top-k over random keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from memaop_triton.config import SELECTIONS, MemAOPConfig
from memaop_triton.errors import check_name
from memaop_triton.kernels.cpu import native


class Selection(NamedTuple):
    """Row (or block) numbers in ascending order, int64, and their weights; both of shape [K]."""

    indices: Tensor
    weights: Tensor


def select_rows(
    scores: Tensor,
    k: int,
    policy: str,
    *,
    generator: torch.Generator | None = None,
) -> Selection:
    """Pick `k` of M rows by their scores s.

    | policy | rows | weights |
    |---|---|---|
    | `topk` | the K largest s | 1 |
    | `weightedk` | K draws without replacement, p ∝ s² | 1 |
    | `randk` | K uniform without replacement | 1 |
    | `uniform` | K uniform without replacement | M/K |
    | `priority` | the K largest s/u, u uniform on (0, 1]; τ is the next one | max(1, τ/s) |
    | `crs` | K draws with replacement, p = s/Σs | 1/(K p) |
    | `bernoulli` | row m with probability p = min(1, λ s), Σp = K | 1/p |
    | `wta` | the top c, and K−c draws with replacement ∝ s from the rest | 1; Σrest/((K−c) s) |

    Sources: Hernandez, Rini, Duman, arXiv 2110.09164 (`topk`, `weightedk`, `randk`; `weightedk`
    with the squared scores of the authors' code); Duffield, Lund, Thorup, J. ACM 54(6), 2007;
    Drineas, Kannan, Mahoney, SIAM J. Comput. 36(1), 2006; Adelman et al., NeurIPS 2021; Liu et al.,
    NeurIPS 2023, whose c minimises Σrest/(K−c). The last five are unbiased: the weighted sum over
    the selection has the sum over all rows as its mean.

    Args:
        scores: [M], float32 or float64, non-negative. NaN counts as +Inf. Rows at +Inf are taken
            before any other; `priority` gives them weight 1 and draws the others as ever. With
            `randk` and `uniform` the values matter only in that respect.
        k: Number of rows, at least 1. `k >= M` returns every row with weight 1.
        policy: A name from the table.
        generator: Source of the draws; the device's default one if `None`. On a CPU `priority`
            takes one number of it, the seed from which the C code draws like the kernels for GPUs.
            Where there is no C compiler, and for the other policies, PyTorch draws from it.

    Returns:
        Ascending indices and their weights in the scores' dtype, K of each. Take the weights for
        constants: not every policy links them to the scores. `crs` and `wta` can name a row twice.
        `bernoulli` returns a fixed number somewhat above K, of which the ones that were not drawn
        have weight 0. A row of score 0 may be returned to fill up to K.

    Raises:
        ValueError: `policy` is unknown, `k` is below 1, or `scores` is not a vector.
        TypeError: `scores` is not float32 or float64.
    """
    check_name("policy", policy, SELECTIONS)
    if scores.dim() != 1:
        raise ValueError(f"scores must be a vector, got shape {tuple(scores.shape)}.")
    if scores.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"scores must be float32 or float64, got {scores.dtype}.")
    if k < 1:
        raise ValueError(f"k={k} must be at least 1.")
    rows = scores.numel()
    if k >= rows:
        return Selection(torch.arange(rows, device=scores.device), torch.ones_like(scores))
    if policy in ("priority", "topk"):
        chosen = native.choose(scores, k, draw=policy == "priority", generator=generator)
        if chosen is not None:
            return Selection(*chosen)
    scores = scores.nan_to_num(nan=math.inf, posinf=math.inf)
    indices, weights = _POLICIES[policy](scores, k, generator)
    indices, order = indices.sort()
    return Selection(indices, weights[order])


def select(
    scores: Tensor,
    config: MemAOPConfig,
    k: int,
    generator: torch.Generator | None = None,
) -> Selection:
    """Pick `k` of the M rows with these scores ([M]), or whole blocks of them, as `config` says.

    Where M cuts the last block short, the rows missing from it are named, from M on: the number of
    rows does not depend on the draws.
    """
    rows = scores.numel()
    block = config.block_rows
    if block == 1 or k == rows:
        return select_rows(scores, k, config.selection, generator=generator)
    blocks = -(-rows // block)
    padded = torch.nn.functional.pad(scores, (0, blocks * block - rows))
    chosen = select_rows(
        padded.view(blocks, block).sum(1),
        -(-k // block),
        config.selection,
        generator=generator,
    )
    indices = (
        chosen.indices.unsqueeze(1) * block + torch.arange(block, device=scores.device)
    ).flatten()
    weights = chosen.weights.repeat_interleave(block)
    return Selection(indices, weights)


def cut(selection: Selection, rows: int) -> Selection:
    """The part of a selection that names rows below `rows`."""
    indices, weights = selection
    inside = indices < rows
    return Selection(indices[inside], weights[inside])


def within(selection: Selection, rows: int) -> Selection:
    """The last row with weight 0 in place of every row beyond it, which cut blocks may name."""
    indices, weights = selection
    return Selection(indices.clamp(max=rows - 1), torch.where(indices < rows, weights, 0))


def is_weighted(policy: str) -> bool:
    """Whether a policy gives any row a weight other than 1."""
    return policy not in ("topk", "weightedk", "randk")


def _to_one(scores: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` draws from (0, 1]."""
    return 1 - torch.rand(count, dtype=scores.dtype, device=scores.device, generator=generator)


def _only_infinite(scores: Tensor) -> Tensor:
    """Scores as they are, or 1 for the infinite rows and 0 elsewhere if there is one.

    A probability proportional to a score has no meaning beside an infinite one. The gradient is
    lost in such a step anyway; what counts is that it shows.
    """
    infinite = scores.isinf()
    return torch.where(infinite.any(), infinite.to(scores.dtype), scores)


def _topk(scores: Tensor, k: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    indices = scores.topk(k, sorted=False).indices
    return indices, scores.new_ones(k)


def _weightedk(scores: Tensor, k: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    # Adding Gumbel noise to log-probabilities and taking the k largest has the law of k sequential
    # draws without replacement.
    gumbel = -(-_to_one(scores, scores.numel(), generator).log()).log()
    return (2 * scores.log() + gumbel).topk(k, sorted=False).indices, scores.new_ones(k)


def _randk(scores: Tensor, k: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    keys = _to_one(scores, scores.numel(), generator).masked_fill(scores.isinf(), math.inf)
    return keys.topk(k, sorted=False).indices, scores.new_ones(k)


def _uniform(scores: Tensor, k: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    indices, weights = _randk(scores, k, generator)
    return indices, weights * (scores.numel() / k)


def _priority(scores: Tensor, k: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    keys, order = (scores / _to_one(scores, scores.numel(), generator)).topk(k + 1)
    indices = order[:k]
    picked = scores[indices]
    weights = torch.where(picked > 0, (keys[k] / picked).clamp(min=1), 0)
    return indices, weights.masked_fill(picked.isinf(), 1)


def _inverse_cdf(cumulative: Tensor, points: Tensor) -> Tensor:
    """Row whose share of `cumulative` (non-decreasing, [M]) holds each point."""
    found = torch.searchsorted(cumulative, points, right=False)
    return found.clamp(max=cumulative.numel() - 1)


def _crs(scores: Tensor, k: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    scores = _only_infinite(scores)
    cumulative = scores.double().cumsum(0)
    total = cumulative[-1]
    indices = _inverse_cdf(cumulative, _to_one(cumulative, k, generator) * total)
    picked = scores[indices]
    weights = torch.where(picked > 0, total / (k * picked), 0).to(scores.dtype)
    return indices, weights


def _bernoulli(scores: Tensor, k: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    probabilities = inclusion_probabilities(_only_infinite(scores), k)
    probabilities = probabilities.masked_fill(scores.isinf(), 1)
    draws = _to_one(scores, scores.numel(), generator)
    drawn = draws <= probabilities
    # The number drawn has a standard deviation of at most √K. Beyond six of them a uniform part of
    # the drawn rows is kept and weighted up, which leaves the mean where it is: given that a row
    # was drawn, draws/p is uniform on (0, 1].
    capacity = min(scores.numel(), k + 6 * math.isqrt(k) + 6)
    keys = torch.where(drawn, draws / probabilities, -1)
    indices = keys.topk(capacity, sorted=False).indices
    surplus = (drawn.sum() / capacity).clamp(min=1)
    weights = torch.where(drawn[indices], surplus / probabilities[indices], 0)
    return indices, weights.to(scores.dtype)


def inclusion_probabilities(scores: Tensor, k: int) -> Tensor:
    """p = min(1, λ s) with λ such that Σp = `k`, or 1 for every non-zero row if these are fewer.

    Args:
        scores: [M], finite and non-negative.
        k: Expected number of rows, below M.
    """
    ordered = scores.double().sort(descending=True).values
    rest = ordered.flip(0).cumsum(0).flip(0)  # [M] Σ of the scores from position t on
    room = k - torch.arange(scores.numel(), device=scores.device)  # left when t rows have p = 1
    # The first t at which no row after the t certain ones would exceed probability 1.
    fits = (room * ordered <= rest).to(torch.uint8)
    certain = fits.argmax()
    scale = room.take(certain) / rest.take(certain)  # indexing would synchronise with the host
    return torch.where(scores > 0, (scores * scale).clamp(max=1), 0).to(scores.dtype)


def _wta(scores: Tensor, k: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    scores = _only_infinite(scores)
    ordered, order = scores.double().sort(descending=True)
    cumulative = ordered.cumsum(0)
    total = cumulative[-1]
    before = cumulative.new_zeros(k)
    before[1:] = cumulative[: k - 1]  # [K] mass of the top c rows, c = 0 … K−1
    draws_left = k - torch.arange(k, device=scores.device)
    certain = ((total - before) / draws_left).argmin()
    before = before.take(certain)  # indexing would synchronise with the host
    mass_left = total - before
    points = before + _to_one(cumulative, k, generator) * mass_left
    position = torch.arange(k, device=scores.device)
    is_certain = position < certain
    drawn = _inverse_cdf(cumulative, points).clamp(min=certain)
    chosen = torch.where(is_certain, position, drawn)
    picked = ordered[chosen]
    sampled_weight = torch.where(picked > 0, mass_left / ((k - certain) * picked), 0)
    weights = torch.where(is_certain, 1.0, sampled_weight).to(scores.dtype)
    return order[chosen], weights


_POLICIES: dict[str, Callable[[Tensor, int, torch.Generator | None], tuple[Tensor, Tensor]]] = {
    "topk": _topk,
    "weightedk": _weightedk,
    "randk": _randk,
    "uniform": _uniform,
    "priority": _priority,
    "crs": _crs,
    "bernoulli": _bernoulli,
    "wta": _wta,
}
