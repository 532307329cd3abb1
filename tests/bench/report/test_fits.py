"""Exponents, the model of time, and the break-even map made from it."""

import math

import pytest

from memaop_triton.bench.report.analysis import models
from memaop_triton.bench.report.breakeven import fields, grade
from memaop_triton.bench.report.data import load
from memaop_triton.bench.report.fits import Point, fit_power, fit_time
from tests.bench.report import made


def test_exponent_of_synthetic_times():
    sizes = [2**i for i in range(8, 16)]
    exact = fit_power(sizes, [3e-3 * m**1.25 for m in sizes])
    assert exact.exponent == pytest.approx(1.25)
    assert exact.scale == pytest.approx(3e-3)
    assert exact.error == pytest.approx(0, abs=1e-6)
    assert exact.growth == "faster than linear"
    bent = fit_power(sizes, [m * (1.1 if i % 2 else 0.9) for i, m in enumerate(sizes)])
    assert abs(bent.exponent - 1) < 3 * bent.error
    assert bent.error > 0.01


def test_a_fixed_part_does_not_bend_the_exponent():
    sizes = [2**i for i in range(8, 16)]
    fit = fit_power(sizes, [0.5 + 3e-3 * m for m in sizes])
    assert fit.exponent == pytest.approx(1, abs=2e-3)
    assert fit.fixed == pytest.approx(0.5, rel=0.02)
    assert fit(1000) == pytest.approx(3.5, rel=5e-3)
    assert fit.growth == "linear"
    few = fit_power(sizes[:4], [0.5 + 3e-3 * m for m in sizes[:4]])
    assert few.fixed == 0
    assert few.exponent < 0.9


def test_standard_error_is_the_textbooks():
    # x = log of 1, e, e², e³; residuals +d, -d, -d, +d are orthogonal to the line.
    sizes, d = [math.exp(i) for i in range(4)], 0.1
    fit = fit_power(
        sizes, [m * math.exp(s * d) for m, s in zip(sizes, (1, -1, -1, 1), strict=True)]
    )
    assert fit.exponent == pytest.approx(1)
    assert fit.error == pytest.approx(math.sqrt(4 * d**2 / 2 / 5))


@pytest.mark.parametrize(
    ("exponent", "growth"),
    [(1.04, "linear"), (0.96, "linear"), (0.9, "slower than linear"), (1.1, "faster than linear")],
)
def test_what_is_called_linear(exponent, growth):
    assert fit_power([1, 10, 100], [10 ** (i * exponent) for i in range(3)]).growth == growth


def test_no_exponent_from_one_size_and_no_error_from_two():
    assert fit_power([64, 64], [1.0, 1.1]) is None
    two = fit_power([64, 128], [1.0, 2.0])
    assert two.exponent == pytest.approx(1)
    assert math.isnan(two.error)


POINTS = [(64, 64, 64, 8), (4096, 64, 128, 512), (4096, 1024, 1024, 512), (8192, 512, 512, 2048)]
POINTS += [(512, 2048, 2048, 32), (65536, 256, 256, 4096)]


def timed(points, fixed, per_element, per_product):
    return [
        Point(m, n, p, k, fixed + per_element * m * (n + p) + per_product * k * n * p)
        for m, n, p, k in points
    ]


def test_time_model_finds_its_terms():
    model = fit_time(timed(POINTS, 0.04, 3e-7, 1e-8))
    assert (model.fixed, model.per_element, model.per_product) == pytest.approx((0.04, 3e-7, 1e-8))
    assert model.worst_error == pytest.approx(0, abs=1e-9)
    assert model(1000, 100, 200, 50) == pytest.approx(0.04 + 0.09 + 0.01)


def test_no_term_of_the_time_model_is_negative():
    model = fit_time(timed(POINTS, -0.001, 3e-7, 1e-8))
    assert model.fixed == 0
    assert model.per_element > 0
    assert model.median_error > 0


def test_no_time_model_where_terms_cannot_be_told_apart():
    assert fit_time(timed(POINTS[:3], 0.04, 3e-7, 1e-8)) is None
    # One width and one ratio: passing over the rows and multiplying grow together.
    same = [(m, 256, 256, m // 8) for m in (256, 512, 1024, 2048, 4096)]
    assert fit_time(timed(same, 0.04, 3e-7, 1e-8)) is None


def test_map_tells_measured_from_fitted(saved):
    cases = load(saved(made.every_case())).cases
    found = fields(cases, models(cases), "default", 1 / 8)
    measured = {(one.m, one.width): one.speedup for one in found if one.measured}
    expected = {
        (c.m, c.n): c.methods["default"].speedup.median
        for c in cases
        if c.n == c.p and c.ratio == 1 / 8 and c.kind not in ("layer", "step", "kernel")
    }
    assert measured == expected
    fitted = [one for one in found if not one.measured]
    assert len(fitted) > 20
    assert {one.inside for one in fitted} == {True, False}
    # The made-up machine's own speed-up, without the noise.
    for one in fitted:
        dense = 2e3 * one.m * one.width**2 / (made.GFLOPS * 1e9)
        passed = 8e3 * one.m * one.width / (made.READ_GBS * 1e9)
        true = (dense + 0.004) / ((1.5 * passed + dense / 8) * 1.06 + 0.045)
        assert one.speedup == pytest.approx(true, rel=0.1)


def test_map_without_a_model_has_measured_cells_only(saved, written):
    one = [made.weight_grad("sweep_width", 4096, 512, 512, 1 / 8)]
    cases = load(saved(one)).cases
    assert [cell.measured for cell in fields(cases, models(cases), "default", 1 / 8)] == [True]
    assert "Measured cells only: too few shapes" in written(one)[1]


def test_map_of_a_bad_fit_has_measured_cells_only(saved, written):
    wild = made.every_case()
    for i, case in enumerate(wild):
        for method in case["methods"].values():
            method["ms"] *= (0.3, 1, 3)[i % 3]
    cases = load(saved(wild)).cases
    assert all(one.measured for one in fields(cases, models(cases), "default", 1 / 8))
    assert "does not fit well enough" in written(wild)[1]


def test_classes_of_speedups():
    assert [grade(one) for one in (0.1, 0.5, 0.99, 1.0, 2.9, 3.0, 9.0)] == [0, 1, 2, 3, 4, 5, 6]
