"""Exponents of growth, and the break-even map."""

import math

import pytest

from memaop_triton.bench.report.analysis import break_even, fit_power
from memaop_triton.bench.report.data import load
from tests.bench.report import made

SIZES = [2**i for i in range(8, 16)]


def test_exponent_of_synthetic_times():
    exact = fit_power(SIZES, [3e-3 * m**1.25 for m in SIZES])
    assert exact.exponent == pytest.approx(1.25, abs=1e-3)
    assert exact.fixed == pytest.approx(0, abs=0.02)
    assert exact.error == pytest.approx(0, abs=1e-3)
    assert exact.sizes == 8
    bent = fit_power(SIZES, [m * (1.1 if i % 2 else 0.9) for i, m in enumerate(SIZES)])
    assert abs(bent.error) > 0.01
    assert abs(bent.exponent - 1) < 3 * bent.error


def test_a_fixed_part_does_not_bend_the_exponent():
    fit = fit_power(SIZES, [0.5 + 3e-3 * m for m in SIZES])
    assert fit.exponent == pytest.approx(1, abs=2e-3)
    assert fit.fixed == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(
    ("exponent", "growth"),
    [(1.04, "linear"), (0.96, "linear"), (0.9, "slower than linear"), (1.1, "faster than linear")],
)
def test_what_is_called_linear(exponent, growth):
    assert fit_power(SIZES, [m**exponent for m in SIZES]).growth == growth


def test_too_few_sizes_have_no_exponent(written):
    assert fit_power(SIZES[:3] + SIZES[:1], [1.0, 2.0, 4.0, 1.1]) is None
    cases = [made.weight_grad("sweep_rows", m, 64, 64, 1 / 8) for m in SIZES[:2]]
    assert "| default | – | – | – | – | too few sizes |" in written(cases)[1]


def test_map_tells_measured_from_interpolated(saved):
    cases = load(saved(made.every_case())).cases
    found = break_even([case for case in cases if case.model is None], "default", 1 / 8)
    assert [one.m for one in found] == sorted(2**i for i in range(6, 18) for _ in range(6))
    measured = {(one.m, one.width): one.speedup for one in found if one.measured}
    expected = {
        (c.m, c.n): c.methods["default"].speedup.median
        for c in cases
        if c.n == c.p and c.ratio == 1 / 8 and c.kind not in ("layer", "step", "kernel")
    }
    assert measured == expected
    between = [one for one in found if not one.measured and math.isfinite(one.speedup)]
    assert len(between) > 10
    # The made-up machine's own speed-up, without the noise.
    for one in between:
        dense = 2e3 * one.m * one.width**2 / (made.GFLOPS * 1e9)
        passed = 8e3 * one.m * one.width / (made.READ_GBS * 1e9)
        true = (dense + 0.004) / ((1.5 * passed + dense / 8) * 1.06 + 0.045)
        assert one.speedup == pytest.approx(true, rel=0.5), one
    assert math.isnan(next(one.speedup for one in found if (one.m, one.width) == (2**17, 64)))


def test_map_of_calls_in_one_plane_has_measured_cells_only(saved):
    cases = load(
        saved([made.weight_grad("sweep_width", 512, n, n, 1 / 8) for n in (64, 256)])
    ).cases
    found = break_even(cases, "default", 1 / 8)
    assert [(one.width, one.measured) for one in found] == [(64, True), (128, False), (256, True)]
    assert math.isnan(found[1].speedup)
