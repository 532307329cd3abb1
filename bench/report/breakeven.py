"""The break-even map: which shapes win, as a grid of M against N = P."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memaop_triton.bench.report.analysis import Models
from memaop_triton.bench.report.data import WEIGHT_GRAD_KINDS, Case

# Upper bounds of the classes of speed-up; the style sheet has a colour for each.
BOUNDS = (0.5, 0.8, 1.0, 1.5, 3.0, 5.0)
MOST_CELLS = 13


@dataclass(frozen=True)
class Field:
    """One cell: its speed-up, whether it was measured, and whether measured calls surround it."""

    m: int
    width: int
    speedup: float
    measured: bool
    inside: bool


def fields(cases: Sequence[Case], models: Models, name: str, ratio: float) -> list[Field]:
    """The map of one method and ratio: measured cells, and fitted ones where the models hold.

    Cells are powers of two from the smallest measured size to the largest. A measured call is in
    the map if N = P; others serve the fit.
    """
    known = [c for c in cases if c.kind in WEIGHT_GRAD_KINDS and name in c.methods]
    square = {(c.m, c.n): c.methods[name] for c in known if c.n == c.p and c.ratio == ratio}
    heights = _sizes([c.m for c in known], [m for m, _ in square])
    widths = _sizes([size for c in known for size in (c.n, c.p)], [n for _, n in square])
    found = []
    for m in heights:
        for width in widths:
            method = square.get((m, width))
            if method is not None:
                found.append(Field(m, width, method.speedup.median, True, True))
                continue
            predicted = models.speedup(name, m, width, width, ratio)
            if predicted is not None:
                inside = _among(known, m, width)
                found.append(Field(m, width, predicted, False, inside))
    return found


def _among(known: Sequence[Case], m: int, width: int) -> bool:
    """Whether some measured call is at least as large in M and N, and another at most."""
    at_least = any(c.m >= m and max(c.n, c.p) >= width for c in known)
    return at_least and any(c.m <= m and min(c.n, c.p) <= width for c in known)


def _sizes(every: Sequence[int], measured: Sequence[int]) -> list[int]:
    low, high = min(every), max(every)
    powers = [2**i for i in range(40) if low <= 2**i <= high]
    while len(powers) > MOST_CELLS:
        powers = powers[1::2]
    return sorted({*powers, *measured})


def grade(speedup: float) -> int:
    """The class of a speed-up: how many of `BOUNDS` it reaches."""
    return sum(speedup >= bound for bound in BOUNDS)
