"""Means and spreads over runs, and how tables and JSON show them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Value(NamedTuple):
    """Mean and sample standard deviation over runs."""

    mean: float
    sd: float


def mean_sd(values: npt.ArrayLike) -> Value:
    """Mean and sample standard deviation (NaN for a single value)."""
    array = np.asarray(values, np.float64)
    sd = float(array.std(ddof=1)) if len(array) > 1 else math.nan
    return Value(float(array.mean()), sd)


def plus_minus(value: Value, digits: int) -> str:
    """`mean ± sd`, or the mean alone where there is no spread."""
    spread = "" if math.isnan(value.sd) else f" ± {value.sd:.{digits}f}"
    return f"{value.mean:.{digits}f}{spread}"


def finite(values: npt.ArrayLike) -> list[float | None]:
    """Numbers for JSON, which has no NaN and no infinity: those are `None`."""
    return [float(value) if math.isfinite(value) else None for value in np.ravel(values)]
