"""The page of made-up results: values in their cells, gaps said."""

import re
from xml.etree import ElementTree

import pytest

from memaop_triton.bench.report.document import Table
from memaop_triton.bench.studies.quality import report, results, sections, step_times, tables
from memaop_triton.bench.studies.quality.crossterms import CrossTerms
from memaop_triton.bench.studies.quality.noise import Noise
from memaop_triton.bench.studies.quality.schemes import RATIOS, SCHEMES, Cell
from memaop_triton.bench.studies.quality.step_times import StepTime
from tests.bench.quality import tiny

CELLS = 1 + len(RATIOS) * sum(scheme.make is not None for scheme in SCHEMES.values())
NAN = float("nan")
OURS, TOPK = Cell("tiny", "subspace", "1/8"), Cell("tiny", "topk", "1/8")


def add_time(store, cell, share):
    """Write what share of a dense step a step of a cell takes."""
    times = (20, 19, 21, 15, 14, 16, share, 0.7, 0.8)
    one = StepTime(*cell, cell.code, "A CPU", 2, 32, *times)
    step_times.add(store.folder / "seconds.csv", one)


@pytest.fixture
def filled(store):
    """Three seeds of dense and some schemes, times, trials, cross terms and noise."""
    for seed, accuracy in enumerate((90.0, 91.0, 92.0)):
        store.add(*tiny.run(seed=seed, accuracy=accuracy))
        store.add(*tiny.run("subspace", "1/8", seed, accuracy=accuracy - 1, weight_grads=0.25))
        store.add(*tiny.run("topk", "1/8", seed, accuracy=accuracy + seed - 1, weight_grads=0.125))
    store.add(*tiny.run("crs", "1/4", 0, accuracy=89.0))
    store.add(*tiny.run("priority-both", "1/4", 0, accuracy=88.0))
    store.add(*tiny.run("topk-residual", "1/32", 0, accuracy=NAN, loss=NAN, diverged_at=5))
    store.add(*tiny.run("topk-residual", "1/32", 1, accuracy=20.0))
    store.add(*tiny.run("wta", "1/2", 0, code="of before", accuracy=12.34))
    add_time(store, OURS, 0.75)
    trials = [
        tiny.trial(lr, accuracy + seed, seed)
        for lr, accuracy in ((0.003, 80.0), (0.006, 85.0), (0.012, NAN))
        for seed in (0, 1)
    ]
    lines = [
        CrossTerms("tiny", layer, "randk", memory, 0.125, draw, 4, norm, 0.9, 3, 4.5)
        for layer, norm in (("hidden1", 4.0), ("hidden2", 8.0))
        for memory in ("residual", "signed")
        for draw in (0, 1)
    ]
    noise = [
        Noise("tiny", 50, layer, 64, 24, 16, 0.125, *one, 0.7)
        for layer in ("hidden1", "hidden2")
        for one in (("none", 0, 30, 2.0), ("input", 4, 20, 0.5), ("grad", 8, 10, 1.5))
    ]
    for name, rows in (("tuning", trials), ("crossterms", lines), ("noise", noise)):
        tables.update(store.folder / f"{name}.csv", type(rows[0]), rows, lambda row: row[:6])
    return store


def table(markdown, caption):
    """The cells of the table below a caption: {row: {column: text}}."""
    lines = markdown.split(caption)[1].strip().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines[: lines.index("")]]
    head = rows[0][1:]
    return {row[0]: dict(zip(head, row[1:], strict=True)) for row in rows[2:]}


DIFFERENCE = "Difference to dense in accuracy, points."
COST = "time of a step over dense's."
OVERVIEW, BOTH = "Difference to dense at r = 1/8", "dX cheaper too: difference to dense at 1/4"
NOISE = "after 50 steps, 1/8 of dense's FLOPs"
CROSS_TERMS = "T = 4: mean over layers, least and most below."
VALUES = [
    (DIFFERENCE, "priority + subspace", "1/8", "−1.00 ± 0.00 (0 of 3 better)"),
    # −1, 0, 1: t(0.975, 2)/√3 = 2.48; the best of the column.
    (DIFFERENCE, "topk", "1/8", "**+0.00 ± 2.48** (1 of 3 better)"),
    (DIFFERENCE, "crs", "1/4", "**−1.00 ± ?** (0 of 1 better)"),
    (DIFFERENCE, "topk + residual (paper)", "1/32", "1 of 2 diverged"),
    (COST, "priority + subspace", "1/8", "0.250 (0.75× time)"),
    (COST, "topk", "1/8", "0.125 (not timed)"),
    (COST, "topk", "1/4", "–"),
    (OVERVIEW, "priority + subspace", "tiny", "−1.00 ± 0.00 (0 of 3 better)"),
    (BOTH, "priority, dX sampled", "tiny", "−2.00 ± ? (0 of 1 better)"),
    (NOISE, "hidden1 (24 to 16)", "batch", "0.7"),
    (NOISE, "hidden2 (24 to 16)", "inputs' side", "**0.5** (q=4, K=20)"),
    (CROSS_TERMS, "randk + signed", "‖S‖/‖D‖", "6 (4 to 8)"),
    (CROSS_TERMS, "randk + residual", "cross", "3 (3 to 3)"),
    (CROSS_TERMS, "randk + residual", "predicted", "4.5 (4.5 to 4.5)"),
]
FACTS = [
    "Dense: 91.00 %, standard deviation 1.00, 3 seeds, 20 steps, learning rate 0.003.",
    f"Cells with fewer than 3 runs: tiny {CELLS - 3} of {CELLS}.",
    f"{CELLS - 2} cells without step times.",
    "1 run left out, because the task or the scheme has changed",
    "| diverged | 1 |",
    "| step times | A CPU, 2 threads |",
    "| tiny | 0.003 (used) | 80.50 |",
    "| tiny | 0.006 | **85.50** |",
    "| tiny | 0.012 | diverged |",
]


def test_values_are_in_their_cells_and_gaps_are_said(filled):
    files = {path.name: path.read_text("utf-8") for path in report.write(filled.folder)}
    pictures = {"tiny-curves.svg", "tiny-trade.svg"}
    assert set(files) == {"quality.html", "quality.md", *pictures}
    page, markdown = files["quality.html"], files["quality.md"]
    for caption, row, column, expected in VALUES:
        assert table(markdown, caption)[row][column] == expected, (caption, row)
    assert [fact for fact in FACTS if fact not in markdown] == []
    # What has not been run takes no place.
    rows = table(markdown, DIFFERENCE)
    assert list(rows["topk"]) == ["1/4", "1/8", "1/32"]
    assert sum(cell != "–" for row in rows.values() for cell in row.values()) == len(rows) == 5
    assert list(table(markdown, OVERVIEW)) == ["priority + subspace", "topk"]
    assert "12.34" not in markdown
    for tone, value in (("bad", "−1.00 ± 0.00"), ("best", "+0.00 ± 2.48"), ("bad", "1 of 2 div")):
        assert f'class="value {tone}">{value}' in page
    for name in pictures:
        ElementTree.fromstring(files[name])
        assert f"]({name})" in markdown
    assert not re.search(r'src=|href="(?!#|https://arxiv\.org/)', page)


# Dense: 84, 85 and 85 after 3/4 of the steps, 80, 81 and 82 after 1/2; 82, 84 and 86 with half the
# rows, in 0.6 of the time, and 90, 91 and 92 with all. The subspace: 89, 90 and 91.
SHORTER = {"1/2": (80.0, 81.0, 82.0), "3/4": (84.0, 85.0, 85.0)}
SMALLER = {"1/2": (82.0, 84.0, 86.0)}


@pytest.mark.parametrize(
    ("scheme", "found", "share", "expected"),
    [
        ("dense-shorter", SHORTER, 0.75, "+5.33 ± 1.43"),
        ("dense-shorter", SHORTER, 0.625, "+7.17 ± 0.72"),
        ("dense-shorter", SHORTER, 0.4, None),
        ("dense-shorter", SHORTER, 1.1, None),
        ("dense-shorter", {}, 0.75, None),
        ("dense-smaller", SMALLER, 0.8, "+2.50 ± 1.24"),
        ("dense-smaller", SMALLER, 0.5, None),
    ],
)
def test_equal_time_compares_with_dense_of_as_many_seconds(filled, scheme, found, share, expected):
    for ratio, accuracies in found.items():
        for seed, accuracy in enumerate(accuracies):
            filled.add(*tiny.run(scheme, ratio, seed, accuracy=accuracy))
    if scheme == "dense-smaller":
        add_time(filled, Cell("tiny", scheme, "1/2"), 0.6)
    add_time(filled, OURS, share)
    section = sections.equal_time_section(results.load(filled.folder))
    if expected is None:
        assert all("not run yet" in block for block in section.blocks[1:])
    else:
        (((name, entry),),) = (one.rows for one in section.blocks[1:] if isinstance(one, Table))
        assert name.text == "priority + subspace, 1/8"
        assert (entry.text, entry.sub) == (expected, f"{share:.2f}× time")


def test_curves_are_means_over_seeds_at_their_cost(filled):
    found = results.load(filled.folder)
    assert found.mean_curve(TOPK) == [(10, pytest.approx(90.9)), (20, pytest.approx(90.95))]
    assert [found.step_ms(one) for one in (OURS, TOPK.dense, TOPK)] == [15, 20, None]


def test_nothing_at_all_is_a_page_too(store):
    _, markdown = report.write(store.folder)
    text = markdown.read_text("utf-8")
    assert text.lower().count("not run yet.") == 8
    assert f"tiny {CELLS} of {CELLS}" in text
