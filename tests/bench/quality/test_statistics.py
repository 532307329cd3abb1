"""Intervals and signs against numbers worked out by hand."""

import math

import pytest

from memaop_triton.bench.studies.quality.statistics import paired

HALF = 4.302653 / math.sqrt(3)  # of a, a + 1 and a + 2: s = 1, t(0.975, 2) = 4.302653
TWO = 12.706205 * 1.5 / 2  # of −0.5 and 1: s = 1.5/√2, t(0.975, 1) = 12.706205


@pytest.mark.parametrize(
    ("scheme", "dense", "sign", "mean", "half_width", "better", "is_clear"),
    [
        ((11.0, 22.0, 33.0), (10.0, 20.0, 30.0), 1, 2, HALF, "3 of 3", False),
        ((1.0, 2.0, 3.0), (6.0, 6.0, 6.0), -1, -4, HALF, "3 of 3", True),  # less loss is better
        ((1.0, 5.0), (1.5, 4.0, -9.0), 1, 0.25, TWO, "1 of 2", False),  # pairs are by seed
        ((1.0,), (1.0,), 1, 0, math.inf, "0 of 1", False),  # a tie is neither
    ],
)
def test_pairs(scheme, dense, sign, mean, half_width, better, is_clear):
    found = paired(dict(enumerate(scheme)), dict(enumerate(dense)), sign)
    assert (found.mean, found.half_width) == pytest.approx((mean, half_width))
    assert f"{found.better} of {found.pairs}" == better
    assert found.is_clear == is_clear


def test_without_pairs_there_is_no_difference():
    assert paired({0: 2.0}, {1: 1.0}, sign=1) is None
