"""Fewer cases than a full product of parameters, with every pair of values among them."""

import itertools
from collections.abc import Iterable
from typing import Any


def pairwise(*parameters: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Cases, as for `pytest.mark.parametrize`, in which any two values of two parameters meet.

    Of the cases of the full product, in its order, the first that brings the most new pairs is
    taken until none is missing: about as many cases as the two longest parameters have pairs.
    """
    values = [list(parameter) for parameter in parameters]
    sizes = [range(len(parameter)) for parameter in values]

    def pairs(case):
        return set(itertools.combinations(enumerate(case), 2))

    left = [(case, pairs(case)) for case in itertools.product(*sizes)]
    missing = set().union(*(new for _, new in left))
    chosen = []
    while missing:
        # What a case brings only shrinks, so that those which bring nothing are not asked again.
        left = [(case, new) for case, old in left if (new := old & missing)]
        case, new = max(left, key=lambda one: len(one[1]))
        missing -= new
        chosen.append(case)
    return [tuple(v[i] for v, i in zip(values, case, strict=True)) for case in sorted(chosen)]
