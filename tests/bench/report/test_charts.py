"""What the charts show, and what becomes of a figure in the page and in a file."""

import itertools
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from matplotlib.collections import LineCollection

from memaop_triton.bench.report import charts, figures, text
from memaop_triton.bench.report.breakeven import Field
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


def test_a_bar_is_as_long_as_its_speedup(saved):
    speeds = {"default": 1.5, "priority": 3.0}
    run = load(saved([made.step("layer", 100.0, speeds, {"default": 2.0})]))
    figure = charts.bars(run.cases)
    widths = {tip.split(":")[0]: bar.get_width() for tip, bar in tips(figure).items()}
    assert widths == pytest.approx(speeds)
    (tick,) = [one for one in figure.findobj(LineCollection) if one.get_linewidth() == [2.5]]
    assert tick.get_segments()[0][:, 0].tolist() == [2.0, 2.0]


def test_names_at_the_ends_of_lines_are_moved_apart_and_stay_inside():
    for wanted in ([0.5] * 3, [0, 0.01, 1], [0.99, 0.98, 0.97, 0.03], [0.5, 0.2, 0.21, 0.22, 0.8]):
        places = charts.apart(wanted, 0.1)
        in_order = sorted(places, key=lambda place: (wanted[places.index(place)], place))
        assert in_order == sorted(places)
        assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(in_order))
        assert min(places) >= 0
        assert max(places) <= 1
    assert charts.apart([0.3, 0.7], 0.1) == pytest.approx([0.3, 0.7])
    assert charts.apart([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert max(charts.apart([i / 20 for i in range(20)], 0.1)) == pytest.approx(1)


@pytest.fixture
def grid():
    return charts.grid([Field(64, 64, 0.25, True, True), Field(128, 64, 2.0, False, False)])


def test_the_page_colours_a_chart_and_a_file_colours_itself(grid):
    themed = figures.svg(grid, "A & <B>")
    assert "fill: var(--g0)" in themed
    assert "fedc" not in themed
    alone = figures.svg(grid, "A & <B>", themed=False)
    assert "var(" not in alone
    assert "fedc" not in alone
    light = figures.STYLE_SHEET.split("@media")[0]
    shown = {one.get("fill") for one in ElementTree.fromstring(alone)} - {None}
    assert shown <= {line.split(";")[0].strip() for line in light.split(":")}


@pytest.mark.parametrize("themed", [True, False])
def test_a_chart_is_valid_and_says_what_it_shows(grid, themed):
    picture = ElementTree.fromstring(figures.svg(grid, "A & <B>", themed=themed))
    assert picture.get("aria-label") == "A & <B>"
    titles = [one.text for one in picture.iter() if one.tag.endswith("title")]
    assert "M = 64, N = P = 64: 0.25×, measured" in titles
    assert "M = 128, N = P = 64: 2.00×, fitted beyond" in titles
    words = [one.text for one in picture.iter() if one.tag.endswith("text")]
    assert {"rows M", "0.2", "2.0", "128"} <= set(words)


def test_the_readers_own_settings_change_nothing(grid):
    before = figures.svg(grid, "title")
    with mpl.rc_context({"text.color": "red", "font.size": 30, "svg.fonttype": "path"}):
        assert figures.svg(grid, "title") == before
        again = charts.grid([Field(64, 64, 0.25, True, True), Field(128, 64, 2.0, False, False)])
    assert figures.svg(again, "title") == before


def test_names_in_the_file_are_no_formulas(saved):
    case = made.step("layer 1", 10.0, {"default": 1.3}, {}) | {"title": "cost $x^2$ & <b>"}
    picture = figures.svg(charts.bars(load(saved([case])).cases), "bars")
    assert "cost $x^2$ &amp; &lt;b&gt;" in picture
