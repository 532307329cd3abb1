"""Exponents of growth, and the break-even map."""

import math

import pytest

from memaop_triton.bench.report.analysis import break_even, fit_power
from memaop_triton.bench.report.data import load
from tests.bench.report import made

SIZES = [2**i for i in range(8, 16)]


@pytest.mark.parametrize(
    ("fixed", "exponent", "growth"),
    [
        (0, 1.25, "faster than linear"),
        (0, 1.1, "faster than linear"),
        (0.5, 1.04, "linear"),
        (0.5, 0.96, "linear"),
        (0, 0.9, "slower than linear"),
    ],
)
def test_exponent_of_synthetic_times(fixed, exponent, growth):
    fit = fit_power(SIZES, [fixed + 3e-3 * m**exponent for m in SIZES])
    assert fit.exponent == pytest.approx(exponent, abs=2e-3)
    assert fit.fixed == pytest.approx(fixed, abs=0.02)
    assert fit.error == pytest.approx(0, abs=1e-3)
    assert (fit.sizes, fit.growth) == (8, growth)


def test_error_of_an_exponent_covers_what_bends_it():
    bent = fit_power(SIZES, [m * (1.1 if i % 2 else 0.9) for i, m in enumerate(SIZES)])
    assert max(0.01, abs(bent.exponent - 1) / 3) < bent.error


def test_too_few_sizes_have_no_exponent(written):
    assert fit_power(SIZES[:3] + SIZES[:1], [1.0, 2.0, 4.0, 1.1]) is None
    cases = [made.weight_grad("sweep_rows", m, 64, 64, 1 / 8) for m in SIZES[:2]]
    assert "| default | – | – | – | – | too few sizes |" in written(cases)[1]


def test_map_tells_measured_from_interpolated(saved):
    def speedup(m, n, ratio):
        return 0.2 * (m / 64) ** 0.3 * (n / 64) ** 0.7 * ratio**-0.5

    corners = [(m, n, r) for m in (64, 1024) for n in (64, 512) for r in (1 / 4, 1 / 16)]
    records = [made.weight_grad("dw", 128, 64, 128, 1 / 8)]  # N is not P
    for m, n, ratio in [*corners, (256, 128, 1 / 8)]:
        records.append(made.weight_grad("sweep_ratio", m, n, n, ratio))
        records[-1]["methods"]["default"]["speedup"] = made.spread(speedup(m, n, ratio))
    cases = load(saved(records)).cases
    found = break_even(cases, "default", 1 / 8)
    assert [(one.m, one.width) for one in found] == [
        (m, n) for m in (64, 128, 256, 512, 1024) for n in (64, 128, 256, 512)
    ]
    assert [(one.m, one.width) for one in found if one.measured] == [(256, 128)]
    for one in found:
        assert one.speedup == pytest.approx(speedup(one.m, one.width, 1 / 8)), one
    outside = break_even(cases, "default", 1 / 32)
    assert all(math.isnan(one.speedup) for one in outside)
    # Of calls in one plane there is nothing to interpolate.
    plane = [made.weight_grad("sweep_width", 512, n, n, 1 / 8) for n in (64, 256)]
    found = break_even(load(saved(plane)).cases, "default", 1 / 8)
    assert [one.measured for one in found] == [True, False, True]
    assert math.isnan(found[1].speedup)
