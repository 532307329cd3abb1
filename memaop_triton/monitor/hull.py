"""Options of a layer, and those that are worth their cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Option:
    """What a layer may be given.

    Attributes:
        share: K/M, or a budget.
        cost: In whatever is scarce: FLOPs, or seconds.
        variance: Of the layer's gradient.
    """

    share: float
    cost: float
    variance: float


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """Options on the lower convex hull of variance against cost, from the cheapest on."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.cost, option.variance)):
        if hull and option.variance >= hull[-1].variance:
            continue
        while len(hull) > 1 and slope(hull[-2], hull[-1]) >= slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def slope(before: Option, after: Option) -> float:
    """Change of variance per unit of cost, negative; −Inf for a step that costs nothing."""
    cost = after.cost - before.cost
    return (after.variance - before.variance) / cost if cost else -math.inf
