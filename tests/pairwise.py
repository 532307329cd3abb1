"""Fewer cases than a full product of three parameters, with every pair of values among them."""

from collections.abc import Iterable
from typing import Any


def pairwise(first: Iterable[Any], second: Iterable[Any], third: Iterable[Any]) -> list[Any]:
    """All of `first` with all of `second`, and values of `third`, the fewest, in turn.

    Raises:
        ValueError: `third` has more values than another, so that pairs would be missing.
    """
    first, second, third = list(first), list(second), list(third)
    if len(third) > min(len(first), len(second)):
        raise ValueError(f"third has {len(third)} values, more than another; let it be the fewest.")
    return [
        (a, b, third[(i + j) % len(third)])
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]
