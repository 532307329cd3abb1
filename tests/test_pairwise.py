"""The tests' own choice of cases leaves no pair out."""

import itertools

import pytest

from tests.pairwise import pairwise


@pytest.mark.parametrize("sizes", [(8, 5, 3), (5, 8, 3), (3, 3, 3), (2, 7, 2), (4, 6, 1)])
def test_every_pair_occurs(sizes):
    values = [[f"{name}{i}" for i in range(size)] for name, size in zip("abc", sizes, strict=True)]
    cases = pairwise(*values)
    assert len(cases) == sizes[0] * sizes[1]
    for i, j in itertools.combinations(range(3), 2):
        met = {(case[i], case[j]) for case in cases}
        assert met == set(itertools.product(values[i], values[j]))


def test_a_longest_third_parameter_is_refused():
    with pytest.raises(ValueError, match="third has 3 values"):
        pairwise("ab", "abc", "xyz")
