"""What the charts show, and what becomes of a figure in the page and in a file."""

import math
import re
from xml.etree import ElementTree

import pytest

from memaop_triton.bench.report import charts, figures, text
from memaop_triton.bench.report.analysis import Field
from memaop_triton.bench.report.data import load
from memaop_triton.bench.report.methods import OURS
from tests.bench.report import made


def tips(figure):
    """The tooltips of a figure, each with the artist that has it."""
    found = ((one.get_gid() or "", one) for one in figure.findobj())
    return {gid.removeprefix("tip:"): one for gid, one in found if gid.startswith("tip:")}


def test_a_mark_or_a_bar_is_where_its_speedup_is(saved):
    run = load(saved([made.weight_grad("sweep_ratio", 4096, 512, 512, r) for r in (1 / 8, 1 / 16)]))
    marks = tips(charts.by_ratio(run.cases))
    assert len(marks) == 2 * len(made.OURS)
    mark = marks["priority, 4096×512×512, r = 1/16: 8.00× (7.84–8.16)"]
    assert mark.get_xydata().tolist() == [[16, 8]]
    run = load(saved([made.step("cost $x^2$ & <b>", {"default": 1.5, "topk": 4.0}, {"topk": 2.0})]))
    figure = charts.bars(run.cases)
    widths = {tip.split(":")[0]: bar.get_width() for tip, bar in tips(figure).items()}
    assert widths == pytest.approx({"default": 1.5, "topk": 4.0})
    assert ">cost $x^2$ &amp; &lt;b&gt;</text>" in figures.svg(figure, "bars")


def test_every_method_has_a_colour_on_a_light_and_a_dark_page(saved):
    run = load(saved([made.step("a net", dict.fromkeys(OURS, 2.0))]))
    picture = figures.svg(charts.bars(run.cases), "bars", themed=True)
    colours = re.findall(r"--([\w-]+): #", figures.STYLE_SHEET)
    for name in OURS:
        assert f"var(--{name})" in picture
        assert colours.count(name) == 2


def test_marks_lie_under_the_roofs_by_what_they_took(saved):
    shape = 4096, 1024, 512
    run = load(saved([made.weight_grad("dw", *shape, r) for r in (1 / 8, 1 / 16)]))
    marks = tips(charts.roofline(run.cases, run.machine))
    assert {tip.split(",")[0] for tip in marks} == {"dense", *made.OURS}
    for case in run.cases:
        flops, unit = 2 * case.k * 1024 * 512, 4096 * 1536 * 4
        start = f"priority, {case.shape}, r = {text.ratio(case.ratio)}:"
        (tip,) = [one for one in marks if one.startswith(start)]
        intensity, gflops = marks[tip].get_xydata()[0]
        assert gflops == pytest.approx(flops / 10 / 1e6)
        assert intensity == pytest.approx(flops / (unit + unit * case.ratio))
        # The GEMM's rate is the roof of the first, reading that of the second.
        roof = made.GFLOPS if case.ratio == 1 / 8 else intensity * made.READ_GBS
        assert tip.endswith(f", {text.percent(gflops / roof)} of the roof")


def test_a_map_is_valid_and_says_what_it_shows():
    cells = [Field(64, 64, 0.25, True), Field(128, 64, 2.0, False), Field(256, 64, math.nan, False)]
    for themed in (True, False):
        content = figures.svg(charts.grid(cells), "A & <B>", themed=themed)
        # The page colours a chart, a file colours itself.
        assert ("fill: var(--g0)" in content) == themed
        picture = ElementTree.fromstring(content)
        assert picture.get("aria-label") == "A & <B>"
        texts = {one.text for one in picture.iter()}
        assert {"rows M", "M = 64, N = P = 64: 0.25×, measured"} <= texts
        assert "M = 128, N = P = 64: 2.00×, interpolated" in texts
        assert not [one for one in texts if one and "nan" in one]
