"""The tests' own choice of cases leaves no pair out."""

import itertools
import math

import pytest

from tests.pairwise import pairwise


@pytest.mark.parametrize("sizes", [(8, 5, 3), (3, 3, 3), (2, 7, 2), (4, 6, 1), (2, 4, 3, 2, 5)])
def test_every_pair_occurs(sizes):
    values = [
        [f"{name}{i}" for i in range(size)] for name, size in zip("abcde", sizes, strict=False)
    ]
    cases = pairwise(*values)
    largest = math.prod(sorted(sizes)[-2:])
    assert largest <= len(set(cases)) == len(cases) <= 1.3 * largest
    for i, j in itertools.combinations(range(len(sizes)), 2):
        met = {(case[i], case[j]) for case in cases}
        assert met == set(itertools.product(values[i], values[j]))
