"""Scales, ticks and labels."""

import itertools
import math
from xml.etree import ElementTree

import pytest

from memaop_triton.bench.report import text
from memaop_triton.bench.report.bars import bars
from memaop_triton.bench.report.charts import by_ratio
from memaop_triton.bench.report.data import load
from memaop_triton.bench.report.svg import Scale, powers, spread, steps
from tests.bench.report import made


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


def test_a_mark_is_as_high_as_its_speedup(saved):
    cases = load(saved([made.weight_grad("sweep_ratio", 4096, 512, 512, r) for r in made.RATIOS]))
    picture = ElementTree.fromstring(str(by_ratio(cases.cases)(508)))
    marks = [one for one in picture.iter("circle") if "s-default" in one.get("class")]
    speeds = [case.methods["default"].speedup.median for case in cases.cases]
    for speed, mark in zip(speeds, marks, strict=True):
        assert f": {text.times(speed)} (" in mark.find("title").text
    heights = [float(mark.get("cy")) for mark in marks]
    (one,) = [float(r.get("y1")) for r in picture.iter("line") if r.get("class") == "one"]
    # Logarithmic: equal factors are equal distances, from the line of 1× on.
    scale = (heights[0] - heights[-1]) / math.log(speeds[-1] / speeds[0])
    assert scale > 0
    for speed, height in zip(speeds, heights, strict=True):
        assert one - height == pytest.approx(scale * math.log(speed), abs=0.2)


def test_a_bar_is_as_long_as_its_speedup(saved):
    speeds = {"default": 1.5, "priority": 3.0}
    run = load(saved([made.step("layer", 100.0, speeds, {"default": 2.0})]))
    picture = ElementTree.fromstring(str(bars(run.cases, "layers")(1040)))
    lengths = [float(r.get("width")) for r in picture.iter("rect")]
    assert lengths[1] == pytest.approx(2 * lengths[0], abs=0.2)
    (start,) = {float(r.get("x")) for r in picture.iter("rect")}
    (tick,) = [one for one in picture.iter("line") if one.get("class") == "wanted"]
    assert float(tick.get("x1")) - start == pytest.approx(lengths[0] / 1.5 * 2.0, abs=0.2)
    whiskers = [one for one in picture.iter("line") if one.get("class") == "whisker"][::3]
    assert float(whiskers[0].get("x2")) - start == pytest.approx(1.03 * lengths[0], abs=0.2)
