"""Scales, ticks and labels."""

import itertools

import pytest

from memaop_triton.bench.report.svg import Scale, powers, spread, steps


def test_labels_are_moved_apart_and_stay_inside():
    for wanted in ([5, 5, 5], [0, 1, 100], [99, 98, 97, 3], [50, 20, 21, 22, 23, 80]):
        places = spread(wanted, 10, 0, 100)
        in_order = sorted(range(len(wanted)), key=lambda i: (wanted[i], places[i]))
        heights = [places[i] for i in in_order]
        assert all(b - a >= 10 - 1e-6 for a, b in itertools.pairwise(heights))
        assert min(heights) >= 5
        assert max(heights) <= 95
    assert spread([30, 70], 10, 0, 100) == pytest.approx([30, 70])
    crowded = spread(range(20), 10, 0, 100)
    assert max(crowded) <= 100


def test_scales_and_ticks():
    scale = Scale(1, 100, 0, 200)
    assert (scale(1), scale(10), scale(100)) == pytest.approx((0, 100, 200))
    assert Scale(0, 4, 100, 0, log=False)(1) == 75
    assert powers(0.4, 9, 2, 9) == [0.5, 1, 2, 4, 8]
    assert powers(1 / 16, 1024, 2, 5) == [1 / 8, 1, 8, 64, 512]
    assert steps(2.4, 4) == [0, 1, 2]
    assert steps(2.4, 8) == pytest.approx([0, 0.5, 1, 1.5, 2])
