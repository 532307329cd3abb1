"""The page of the committed results, and of made-up ones: values in their cells, gaps reported."""

import shutil

import pytest

from memaop_triton.bench.report.document import Table
from memaop_triton.bench.studies.quality import report, results, sections, step_times
from memaop_triton.bench.studies.quality.schemes import RATIOS, SCHEMES, Cell
from memaop_triton.bench.studies.quality.step_times import StepTime
from memaop_triton.bench.studies.quality.store import RESULTS
from tests.bench.quality import tiny
from tests.judging import figures

# Dense, dense with fewer steps, the library's own decision, and the grid.
CELLS = 1 + 3 + 1 + len(RATIOS) * sum(scheme.has_ratios for scheme in SCHEMES.values())
OURS, TOPK = Cell("tiny", "subspace", "1/8"), Cell("tiny", "topk", "1/8")


@pytest.mark.slow  # it draws all pictures and fits every formula
def test_the_committed_page_is_that_of_the_committed_results(tmp_path):
    for path in RESULTS.glob("*.csv"):
        shutil.copy(path, tmp_path)
    page, markdown, *pictures = report.write(tmp_path)
    committed = (RESULTS / "quality.md").read_text("utf-8")
    assert figures(markdown.read_text("utf-8")) == figures(committed)
    assert {path.name for path in pictures} == {path.name for path in RESULTS.glob("*.svg")}
    assert 'class="value bad">' in page.read_text("utf-8")


def add_time(store, cell, share):
    """Write what share of a dense step a step of a cell takes."""
    times = (20, 19, 21, 15, 14, 16, share, 0.7, 0.8)
    one = StepTime(*cell, cell.code, "A CPU", 2, 32, *times)
    step_times.add(store.folder / "seconds.csv", one)


@pytest.fixture
def filled(store):
    """Three seeds of dense and two schemes, one that diverges, one of before, and a time."""
    for seed, accuracy in enumerate((90.0, 91.0, 92.0)):
        store.add(*tiny.run(seed=seed, accuracy=accuracy))
        store.add(*tiny.run("subspace", "1/8", seed, accuracy=accuracy - 1, weight_grads=0.25))
        store.add(*tiny.run("topk", "1/8", seed, accuracy=accuracy + seed - 1, weight_grads=0.125))
    store.add(*tiny.run("crs", "1/4", 0, accuracy=89.0))
    nan = float("nan")
    store.add(*tiny.run("topk-residual", "1/32", 0, accuracy=nan, loss=nan, diverged_at=5))
    store.add(*tiny.run("topk-residual", "1/32", 1, accuracy=20.0))
    store.add(*tiny.run("wta", "1/2", 0, code="of before", accuracy=12.34))
    add_time(store, OURS, 0.75)
    return store


def test_values_are_in_their_cells_and_gaps_are_said(filled):
    _, markdown, *_ = report.write(filled.folder)
    text = markdown.read_text("utf-8")
    for line in (
        "Dense: 91.00 %, standard deviation 1.00, 3 seeds, 20 steps, learning rate 0.003.",
        f"Cells with fewer than 3 runs: tiny {CELLS - 3} of {CELLS}.",
        f"{CELLS - 6} cells without step times.",
        "1 run left out, because the task or the scheme has changed",
        "| diverged | 1 |",
        "| step times | A CPU, 2 threads |",
        "| scheme | 1/4 | 1/8 | 1/32 |",
        "| priority + subspace | – | −1.00 ± 0.00 (0 of 3 better) | – |",
        # −1, 0, 1: t(0.975, 2)/√3 = 2.48; the best of the column.
        "| topk | – | **+0.00 ± 2.48** (1 of 3 better) | – |",
        "| crs | **−1.00 ± ?** (0 of 1 better) | – | – |",
        "| topk + residual (paper) | – | – | 1 of 2 diverged |",
        "| priority + subspace | – | 0.250 (0.75× time) | – |",
        "| topk | – | 0.125 (not timed) | – |",
    ):
        assert line in text
    assert "12.34" not in text


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
    assert text.lower().count("not run yet.") == 11
    assert f"tiny {CELLS} of {CELLS}" in text
