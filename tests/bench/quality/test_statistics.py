"""Intervals and signs against numbers worked out by hand."""

import math

import pytest

from memaop_triton.bench.studies.quality.statistics import half_width, paired


def test_three_pairs():
    # Differences 1, 2, 3: mean 2, standard deviation 1, t(0.975, 2) = 4.302653.
    difference = paired({0: 11.0, 1: 22.0, 2: 33.0}, {0: 10.0, 1: 20.0, 2: 30.0}, sign=1)
    assert difference.mean == 2
    assert difference.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert (difference.pairs, difference.better) == (3, 3)
    assert difference.low < 0 < difference.high
    assert not difference.is_clear


def test_pairs_are_by_seed_and_others_are_left_out():
    difference = paired({1: 5.0, 0: 1.0, 7: 99.0}, {0: 1.5, 1: 4.0, 3: -9.0}, sign=1)
    assert difference.mean == pytest.approx((-0.5 + 1) / 2)
    assert (difference.pairs, difference.better) == (2, 1)


def test_less_loss_is_better():
    difference = paired({0: 1.0, 1: 1.01, 2: 0.99}, {0: 2.0, 1: 2.0, 2: 2.0}, sign=-1)
    assert difference.mean == pytest.approx(-1)
    assert difference.better == 3
    assert difference.is_clear


def test_a_tie_is_neither():
    difference = paired({0: 1.0}, {0: 1.0}, sign=1)
    assert difference.better == 0


def test_a_single_pair_has_no_interval():
    assert paired({0: 2.0}, {0: 1.0}, sign=1).half_width == math.inf
    assert paired({0: 2.0}, {1: 1.0}, sign=1) is None


def test_five_values():
    # s = √2.5, t(0.975, 4) = 2.776445.
    assert half_width([1, 2, 3, 4, 5]) == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
