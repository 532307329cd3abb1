"""Differences to dense, paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A mean difference to dense over seeds.

    Attributes:
        mean: In the unit of the metric; above zero is more, not better.
        half_width: Of its confidence interval; infinite with a single pair.
        pairs: Seeds of which both runs are there.
        better: Pairs in which dense lost.
    """

    mean: float
    half_width: float
    pairs: int
    better: int

    @property
    def is_clear(self) -> bool:
        """Whether zero lies outside the interval."""
        return abs(self.mean) > self.half_width


def paired(scheme: Mapping[int, float], dense: Mapping[int, float], sign: int) -> Difference | None:
    """The mean of scheme − dense over the seeds that both have, `None` if there are none.

    Args:
        scheme: Metric by seed.
        dense: Metric by seed.
        sign: 1 if more of the metric is better, −1 if less is.
    """
    differences = [scheme[seed] - dense[seed] for seed in sorted(scheme.keys() & dense.keys())]
    if not differences:
        return None
    return Difference(
        fmean(differences),
        half_width(differences),
        len(differences),
        sum(sign * one > 0 for one in differences),
    )


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % confidence interval of a mean, by Student's t: t·s/√n, infinite for n = 1.

    It takes the values for draws of a normal distribution; with three of them t is 4.30.
    """
    if len(values) < 2:
        return math.inf
    from scipy.stats import t

    quantile = float(t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1))
    return quantile * stdev(values) / math.sqrt(len(values))
