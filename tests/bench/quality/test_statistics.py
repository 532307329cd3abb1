"""Intervals and signs against numbers worked out by hand."""

import math

import pytest

from memaop_triton.bench.studies.quality.statistics import half_width, paired


@pytest.mark.parametrize(
    ("scheme", "dense", "sign", "mean", "pairs", "better"),
    [
        ((11.0, 22.0, 33.0), (10.0, 20.0, 30.0), 1, 2, 3, 3),
        ((1.0, 1.01, 0.99), (2.0, 2.0, 2.0), -1, -1, 3, 3),  # less loss is better
        ((1.0, 5.0), (1.5, 4.0, -9.0), 1, 0.25, 2, 1),  # pairs are by seed
        ((1.0,), (1.0,), 1, 0, 1, 0),  # a tie is neither
    ],
)
def test_pairs(scheme, dense, sign, mean, pairs, better):
    difference = paired(dict(enumerate(scheme)), dict(enumerate(dense)), sign)
    assert difference.mean == pytest.approx(mean)
    assert (difference.pairs, difference.better) == (pairs, better)


def test_a_clear_difference_is_wider_than_its_interval():
    # Differences 1, 2, 3: mean 2, standard deviation 1, t(0.975, 2) = 4.302653.
    difference = paired({0: 1.0, 1: 2.0, 2: 3.0, 7: 99.0}, dict.fromkeys(range(3), 0.0), sign=1)
    assert difference.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert not difference.is_clear
    for shift in (-6.0, 2.0):
        assert paired({0: 1.0, 1: 2.0, 2: 3.0}, dict.fromkeys(range(3), -shift), 1).is_clear


def test_a_single_pair_has_no_interval():
    assert paired({0: 2.0}, {0: 1.0}, sign=1).half_width == math.inf
    assert paired({0: 2.0}, {1: 1.0}, sign=1) is None


def test_five_values():
    # s = √2.5, t(0.975, 4) = 2.776445.
    assert half_width([1, 2, 3, 4, 5]) == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
