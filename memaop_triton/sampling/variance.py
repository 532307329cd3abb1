"""How much variance the draw of K rows adds to a sum of outer products, as a function of K.

Rows drawn with the probabilities p_m = min(1, s_m/t), which is what `priority` and `bernoulli`
come to, have the variance Σ s² (1/p − 1) = Σ s max(0, t − s), and there are Σ p of them on average.
A curve holds both for a few thresholds t, multiples of the mean score. Between two of them the
variance is taken to be linear in 1/K, as it is wherever the rows with p = 1 stay the same: it is
never too small, nor larger by more than a fiftieth of Σ s².
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor

#: The first threshold, 2⁶ times the mean score, is for 1/64 of the rows at most; each is half of
#: the one before.
FIRST_POWER = 6
#: Thresholds of a curve.
POINTS = 13


def variance_curve(scores: Tensor) -> Tensor:
    """The curve of rows with these scores, without a host synchronisation.

    Args:
        scores: [..., M], finite and non-negative.

    Returns:
        [..., 2, POINTS]: the shares of the rows that are drawn, ascending, and the variances.
    """
    least = torch.finfo(scores.dtype).tiny
    mean = scores.mean(-1, keepdim=True).clamp(min=least)
    powers = torch.arange(FIRST_POWER, FIRST_POWER - POINTS, -1, device=scores.device)
    thresholds = (mean * torch.exp2(powers.to(scores.dtype))).unsqueeze(-1)
    s = scores.unsqueeze(-2)
    shares = (s / thresholds).clamp(max=1).mean(-1)
    return torch.stack([shares, (s * (thresholds - s).clamp(min=0)).sum(-1)], -2)


def variance_at(share: float, shares: Sequence[float], variances: Sequence[float]) -> float:
    """The variance where this share of the rows is drawn, in (0, 1]; 0 from 1 on.

    Args:
        share: K/M.
        shares: Of a curve, ascending.
        variances: Of the same.
    """
    if share >= 1:
        return 0.0
    after = min(max(1, bisect.bisect_left(shares, share)), len(shares))
    k0, v0 = shares[after - 1], variances[after - 1]
    k1, v1 = (shares[after], variances[after]) if after < len(shares) else (1.0, 0.0)
    if not 0 < k0 < k1:
        return v1
    return max(0.0, v0 + (v1 - v0) * (1 / k0 - 1 / share) / (1 / k0 - 1 / k1))
