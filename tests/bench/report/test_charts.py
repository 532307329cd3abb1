"""What the charts show, and what becomes of a figure in the page and in a file."""

import math
import re
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex

from memaop_triton.bench.report import charts, figures, text
from memaop_triton.bench.report.analysis import Field
from memaop_triton.bench.report.data import load
from tests.bench.report import made


def tips(figure):
    """The tooltips of a figure, each with the artist that has it."""
    found = ((one.get_gid() or "", one) for one in figure.findobj())
    return {gid.removeprefix("tip:"): one for gid, one in found if gid.startswith("tip:")}


def test_a_mark_is_where_its_speedup_is(saved):
    run = load(saved([made.weight_grad("sweep_ratio", 4096, 512, 512, r) for r in made.RATIOS]))
    marks = tips(charts.by_ratio(run.cases))
    assert len(marks) == len(run.cases) * len(made.OURS)
    for case in run.cases:
        speed = case.methods["default"].speedup
        quartiles = text.span(speed.q1, speed.q3)
        where = f"default, {case.shape}, r = {text.ratio(case.ratio)}"
        mark = marks[f"{where}: {text.times(speed.median)} ({quartiles})"]
        assert mark.get_xydata().tolist() == [[pytest.approx(1 / case.ratio), speed.median]]


def test_marks_lie_under_the_roofs_by_what_they_took(saved):
    shape = 4096, 1024, 512
    run = load(saved([made.weight_grad("dw", *shape, r) for r in (1 / 8, 1 / 16)]))
    marks = tips(charts.roofline(run.cases, run.machine))
    assert {tip.split(",")[0] for tip in marks} == {"dense", *made.OURS}
    for case in run.cases:
        method = case.methods["priority"]
        (tip,) = [
            t for t in marks if t.startswith(f"priority, {case.shape}, r = 1/{4096 // case.k}:")
        ]
        intensity, gflops = marks[tip].get_xydata()[0]
        assert gflops == pytest.approx(2 * case.k * 1024 * 512 / method.ms.median / 1e6)
        unit = 4096 * 1536 * 4
        assert intensity == pytest.approx(2 * case.k * 1024 * 512 / (unit + unit * case.ratio))
        # The GEMM's rate is the roof of the first, reading that of the second.
        roof = made.GFLOPS if case.ratio == 1 / 8 else intensity * made.READ_GBS
        assert roof <= made.GFLOPS
        assert tip.endswith(f", {text.percent(gflops / roof)} of the roof")


def test_a_bar_is_as_long_as_its_speedup(saved):
    speeds = {"default": 1.5, "priority": 3.0}
    run = load(saved([made.step("MLP", speeds, {"default": 2.0})]))
    figure = charts.bars(run.cases)
    widths = {tip.split(":")[0]: bar.get_width() for tip, bar in tips(figure).items()}
    assert widths == pytest.approx(speeds)
    (tick,) = [one for one in figure.findobj(LineCollection) if one.get_linewidth() == [2.5]]
    assert tick.get_segments()[0][:, 0].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([0.3, 0.7], [0.3, 0.7]),
        ([0.5, 0.5, 0.5], [0.4, 0.5, 0.6]),
        ([1, 0.99, 0.02], [1, 0.9, 0.02]),
        ([0, 0.05, 0.5], [0, 0.1, 0.5]),
        ([0.0] * 5 + [1.0] * 16, [i / 20 for i in range(21)]),  # no room for gaps of 0.1
    ],
)
def test_names_at_the_ends_of_lines_are_moved_apart_and_stay_inside(wanted, expected):
    assert charts.apart(wanted, 0.1) == pytest.approx(expected)


def grid():
    cells = [Field(64, 64, 0.25, True), Field(128, 64, 2.0, False), Field(256, 64, math.nan, False)]
    return charts.grid(cells)


@pytest.mark.parametrize(
    ("speedup", "grade"),
    [(0.1, 0), (0.5, 1), (0.99, 2), (1.0, 3), (2.9, 4), (3.0, 5), (9.0, 6)],
)
def test_classes_of_speedups(speedup, grade):
    (cell,) = tips(charts.grid([Field(64, 64, speedup, True)])).values()
    assert to_hex(cell.get_facecolor()) == figures.colour(f"g{grade}")


@pytest.mark.parametrize("themed", [True, False])
def test_a_chart_is_valid_and_says_what_it_shows(themed):
    content = figures.svg(grid(), "A & <B>", themed=themed)
    # The page colours a chart, a file colours itself.
    assert ("fill: var(--g0)" in content) == themed
    light = re.search("--g0: (#[0-9a-f]{6})", figures.STYLE_SHEET)[1]
    assert (f"fill: {light}" in content) != themed
    assert "fedc" not in content
    picture = ElementTree.fromstring(content)
    assert picture.get("aria-label") == "A & <B>"
    texts = {one.text for one in picture.iter()}
    assert {"rows M", "0.2", "2.0", "128", "M = 64, N = P = 64: 0.25×, measured"} <= texts
    assert "M = 128, N = P = 64: 2.00×, interpolated" in texts
    assert not [one for one in texts if one and "nan" in one]


def test_the_readers_own_settings_change_nothing():
    before = figures.svg(grid(), "title")
    with mpl.rc_context({"text.color": "red", "font.size": 30, "svg.fonttype": "path"}):
        assert figures.svg(grid(), "title") == before


def test_names_in_the_file_are_no_formulas(saved):
    case = made.step("cost $x^2$ & <b>", {"default": 1.3})
    picture = figures.svg(charts.bars(load(saved([case])).cases), "bars")
    assert ">cost $x^2$ &amp; &lt;b&gt;</text>" in picture
