"""Least squares: the exponent of growth, and a model of a call's time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

Vector = npt.NDArray[np.float64]

# An exponent this close to 1 is called linear.
LINEAR = 0.05
# A model is used for predictions if half of the measured times lie within this share of it.
GOOD_ENOUGH = 0.15
# With fewer points the fixed part cannot be separated from the part that grows.
_ENOUGH_FOR_FIXED = 5
# Above it two terms cannot be separated, as with one width and one ratio.
_WORST_CONDITION = 1e4


@dataclass(frozen=True)
class Power:
    """time = fixed + scale · M^exponent.

    Attributes:
        fixed: What any call takes, in the times' unit, not below zero; 0 from few points.
        scale: In the times' unit.
        exponent: Of the part that grows.
        error: The exponent's standard error; NaN if there are no more points than unknowns.
        points: How many there were.
    """

    fixed: float
    scale: float
    exponent: float
    error: float
    points: int

    @property
    def growth(self) -> str:
        """`linear`, `slower than linear` or `faster than linear`."""
        if abs(self.exponent - 1) <= LINEAR:
            return "linear"
        return f"{'slower' if self.exponent < 1 else 'faster'} than linear"

    def __call__(self, m: float) -> float:
        """The time at M rows."""
        return self.fixed + self.scale * math.pow(m, self.exponent)


def fit_power(sizes: Sequence[float], times: Sequence[float]) -> Power | None:
    """Least squares of log(time) in fixed part, scale and exponent, the fixed part not below zero.

    Fewer than `_ENOUGH_FOR_FIXED` points are taken to have no fixed part; `None` with fewer than
    two different sizes.
    """
    if len(set(sizes)) < 2:
        return None
    x, t = np.log(np.asarray(sizes, float)), np.asarray(times, float)
    if len(x) < _ENOUGH_FOR_FIXED:
        return _power(x, t, 0.0)
    # In shares of the smallest time; of fixed parts that fit alike the smallest.
    low, high = 0.0, 1.0
    for _ in range(4):
        shares = np.linspace(low, high, 41)[:-1]
        misfits = [_misfit(_power(x, t, share * t.min()), x, t) for share in shares]
        best, step = int(np.argmin(misfits)), shares[1] - shares[0]
        low, high = max(0.0, shares[best] - step), shares[best] + step
    return _power(x, t, float(shares[best] * t.min()))


def _power(x: Vector, t: Vector, fixed: float) -> Power:
    """The best for this fixed part: a line in logarithms through what is beyond it."""
    beyond = t - fixed
    # Errors are of the whole time; of a small part beyond the fixed one they are a larger share.
    weight = (beyond / t) ** 2
    y = np.log(beyond)
    centred = x - weight @ x / weight.sum()
    spread = float(weight @ centred**2)
    slope = float((weight * centred) @ y) / spread
    offset = float(weight @ (y - slope * x) / weight.sum())
    # A fixed part that was fitted as well is one unknown more.
    free = len(x) - 2 - (len(x) >= _ENOUGH_FOR_FIXED)
    left = np.sqrt(weight) * (y - offset - slope * x)
    error = math.sqrt(float(left @ left) / free / spread) if free > 0 else math.nan
    return Power(fixed, math.exp(offset), slope, error, len(x))


def _misfit(fit: Power, x: Vector, t: Vector) -> float:
    predicted = fit.fixed + fit.scale * np.exp(fit.exponent * x)
    return float(np.sum(np.log(predicted / t) ** 2))


@dataclass(frozen=True)
class Point:
    """One measured call: M, N, P, the rows it computed, and its milliseconds."""

    m: int
    n: int
    p: int
    k: int
    ms: float


@dataclass(frozen=True)
class TimeModel:
    """time = fixed + per_element · M(N+P) + per_product · K·N·P, no term below zero.

    Attributes:
        fixed: Milliseconds of any call.
        per_element: Milliseconds per element of X and G.
        per_product: Milliseconds per multiply-add of the GEMM.
        points: How many times it was fitted to.
        median_error: Of |fit/time - 1|.
        worst_error: The largest of them.
    """

    fixed: float
    per_element: float
    per_product: float
    points: int
    median_error: float
    worst_error: float

    def __call__(self, m: int, n: int, p: int, k: int) -> float:
        """Milliseconds of a call."""
        products = float(k) * n * p
        return self.fixed + self.per_element * float(m) * (n + p) + self.per_product * products

    @property
    def good(self) -> bool:
        """Whether half of the measured times are within `GOOD_ENOUGH` of it."""
        return self.median_error <= GOOD_ENOUGH


def fit_time(points: Sequence[Point]) -> TimeModel | None:
    """Least squares of relative errors; `None` where the points do not determine three terms."""
    if len(points) < 4:
        return None
    terms = np.array([(1.0, p.m * (p.n + p.p), float(p.k) * p.n * p.p) for p in points], float)
    times = np.array([p.ms for p in points], float)
    relative = terms / times[:, None]
    if np.linalg.cond(relative / np.linalg.norm(relative, axis=0)) > _WORST_CONDITION:
        return None
    scale = np.linalg.norm(relative, axis=0)
    solution = nnls(relative / scale, np.ones(len(points)))[0] / scale
    errors = np.abs(terms @ solution / times - 1)
    fixed, per_element, per_product = map(float, solution)
    middle, worst = float(np.median(errors)), float(errors.max())
    return TimeModel(fixed, per_element, per_product, len(points), middle, worst)
