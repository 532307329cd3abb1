"""Tables and headlines show the numbers of the file."""

import re

import pytest

from memaop_triton.bench.report import text
from tests.bench.report import made
from tests.bench.report.made import markdown_tables


def test_values_of_the_table_are_those_of_the_file(written):
    case = made.weight_grad("dw", 8192, 1024, 512, 1 / 16)
    page, markdown = written([case])
    head, _, row = next(t for t in markdown_tables(markdown) if t[0][0].startswith("M × N"))
    assert row[:2] == ["8192×1024×512", "1/16"]
    names = [*made.OURS, *made.BASELINES]
    fastest = max(names, key=lambda name: case["methods"][name]["speedup"]["median"])
    for name in names:
        cell, speed = row[head.index(name)], case["methods"][name]["speedup"]
        shown = [float(one) for one in re.findall(r"\d+(?:\.\d+)?", cell)]
        assert shown == pytest.approx([speed["median"], speed["q1"], speed["q3"]], rel=7e-3)
        assert cell.startswith("**") == (name == fastest)
        assert text.times(speed["median"]) in page


def test_share_of_the_limit_is_of_the_limit_timed_beside(written):
    case = made.weight_grad("dw", 4096, 512, 512, 1 / 8)
    other = case | {"title": "slower", "methods": {
        "dense": case["methods"]["dense"],
        "vcas": case["methods"]["vcas"],
        "default": case["methods"].pop("default"),
        "limit": made.method("limit", "limit", 0.0125, 8.0),
    }}  # fmt: skip
    other["methods"]["default"]["ms"] = 0.05
    case["methods"]["topk"]["ms"] = 4 * case["methods"]["limit"]["ms"]
    _, markdown = written([case, other])
    head, _, row = next(
        t for t in markdown_tables(markdown) if "authors" not in t[0] and "topk" in t[0]
    )
    shares = dict(zip(head, (cell.replace("\N{NO-BREAK SPACE}", " ") for cell in row), strict=True))
    assert shares["default"] == "25 % (12.5 µs / 50.0 µs)"
    assert shares["topk"].startswith("25 %")


def test_methods_of_one_shape_in_several_cases_share_a_row(written):
    whole = made.weight_grad("dw", 4096, 512, 512, 1 / 8)
    apart = []
    for name in ("default", "priority"):
        kept = {n: whole["methods"][n] for n in ("dense", name, "vcas")}
        apart.append(whole | {"title": name, "methods": kept})
    _, markdown = written(apart)
    head, _, *body = next(t for t in markdown_tables(markdown) if t[0][0].startswith("M × N"))
    assert head[3:] == ["default", "priority", "vcas"]
    assert len(body) == 1


def test_cold_caches_have_a_table_of_their_own(written):
    case = made.weight_grad("dw", 4096, 512, 512, 1 / 8)
    assert "Cold caches" not in written([case])[1]
    speeds = {"median": 2.5, "q1": 2.25, "q3": 2.75}
    case["methods"]["topk"]["cold"] = {"ms": 1.0, "q1": 1.0, "q3": 1.0, "speedup": speeds}
    page, markdown = written([case])
    assert "<summary>Cold caches</summary>" in page
    (table,) = [t for t in markdown_tables(markdown) if "2.50× (2.25–2.75)" in t[2]]
    assert table[2].index("2.50× (2.25–2.75)") == table[0].index("topk")
    assert table[2].count("–") == len(table[0]) - 3


def test_overhead_is_what_is_beyond_dense(written):
    case = made.weight_grad("overhead", 64, 64, 64, 1 / 8)
    case["methods"]["dense"]["ms"], case["methods"]["topk"]["ms"] = 0.01, 0.0525
    page, markdown = written([case])
    table = next(t for t in markdown_tables(markdown) if "beyond dense" in t[0])
    lines = {row[2]: [one.replace("\N{NO-BREAK SPACE}", " ") for one in row[3:]] for row in table}
    assert lines["topk"] == ["52.5 µs", "42.5 µs"]
    assert lines["dense"] == ["10.0 µs", "–"]
    assert "overhead of a call" in page


def test_headline_is_computed(written):
    cases = [made.weight_grad("dw", m, 512, 512, r) for m in (1024, 4096) for r in (1 / 8, 1 / 16)]
    for case, speed in zip(cases, (2.0, 50.0, 8.0, 60.0), strict=True):
        case["methods"]["default"]["speedup"] = {"median": speed, "q1": speed, "q3": speed}
    # Another dtype is not part of the mean.
    cases.append(made.weight_grad("dw", 2048, 512, 512, 1 / 8) | {"dtype": "bfloat16"})
    page, markdown = written(cases)
    assert '<p class="number">4.00×</p>' in page
    assert "geometric mean of 2 cases, 2.00× to 8.00×" in markdown


def test_ratio_of_the_headline(written):
    sixteenths = [made.weight_grad("dw", m, 64, 64, 1 / 16) for m in (256, 512)]
    quarter, eighth = (made.weight_grad("dw", 256, 64, 64, r) for r in (1 / 4, 1 / 8))
    assert "(`default` at r = 1/16, against dense" in written([*sixteenths, quarter])[1]
    assert "(`default` at r = 1/8, against dense" in written([*sixteenths, eighth])[1]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (text.times(0.4567), "0.46×"),
        (text.times(0.0456), "0.046×"),
        (text.times(9.994), "9.99×"),
        (text.times(9.996), "10.0×"),
        (text.times(1234.4), "1234×"),
        (text.duration(0.0466), "46.6 µs"),
        (text.duration(0.996), "996 µs"),
        (text.duration(-0.002), "-2.00 µs"),
        (text.duration(2.456), "2.46 ms"),
        (text.rate(200.0, "FLOP"), "200 GFLOP/s"),
        (text.rate(2950.0, "B"), "2.95 TB/s"),
        (text.ratio(1 / 8), "1/8"),
        (text.ratio(1.0), "1"),
        (text.axis(2048), "2k"),
        (text.axis(3000), "3k"),
        (text.count(1, "call"), "1 call"),
    ],
)
def test_numbers_as_text(shown, expected):
    assert shown.replace("\N{NO-BREAK SPACE}", " ") == expected
