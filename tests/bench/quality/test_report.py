"""The page of made-up results: values in their cells, gaps said."""

import re
from xml.etree import ElementTree

import pytest

from memaop_triton.bench.studies.quality import report, results, tables
from memaop_triton.bench.studies.quality.crossterms import CrossTerms
from memaop_triton.bench.studies.quality.noise import Noise
from memaop_triton.bench.studies.quality.schemes import RATIOS, SCHEMES, Cell, code_of
from memaop_triton.bench.studies.quality.step_times import StepTime
from memaop_triton.bench.studies.quality.tuning import Trial, with_rate
from tests.bench.quality import tiny

SAMPLED = [name for name, scheme in SCHEMES.items() if scheme.make]
CELLS = 1 + len(RATIOS) * len(SAMPLED)

NAN = float("nan")
NO_EQUAL_TIME = "## At equal time\n\nNot measured yet."


OURS = Cell("tiny", "subspace", "1/8")


def add_times(store, shares):
    """Write what share of a dense step the steps of some cells take."""
    times = [
        StepTime(*cell, cell.code, "A CPU", 2, 32, 20, 19, 21, 15, 14, 16, share, 0.7, 0.8)
        for cell, share in shares.items()
    ]
    tables.write(store.folder / "seconds.csv", StepTime, times)


def report_of(store):
    """The Markdown of what is there."""
    return report.write(store.folder)[1].read_text("utf-8")


@pytest.fixture
def filled(store):
    """Three seeds of dense and some schemes, times, trials and cross terms."""
    for seed, accuracy in enumerate((90.0, 91.0, 92.0)):
        store.add(*tiny.run(seed=seed, accuracy=accuracy))
        store.add(*tiny.run("subspace", "1/8", seed, accuracy=accuracy - 1, weight_grads=0.25))
        store.add(*tiny.run("topk", "1/8", seed, accuracy=accuracy + seed - 1, weight_grads=0.125))
    store.add(*tiny.run("crs", "1/4", 0, accuracy=89.0))
    store.add(*tiny.run("priority-both", "1/4", 0, accuracy=88.0))
    store.add(*tiny.run("topk-residual", "1/32", 0, accuracy=NAN, loss=NAN, diverged_at=5))
    store.add(*tiny.run("topk-residual", "1/32", 1, accuracy=20.0))
    store.add(*tiny.run("wta", "1/2", 0, code="of before", accuracy=12.34))
    add_times(store, {OURS: 0.75})
    trials = [
        Trial("tiny", lr, seed, code_of(with_rate(tiny.TASK, lr), None), 0.5, accuracy + seed)
        for lr, accuracy in ((0.003, 80.0), (0.006, 85.0), (0.012, NAN))
        for seed in (0, 1)
    ]
    tables.write(store.folder / "tuning.csv", Trial, trials)
    lines = [
        CrossTerms("tiny", layer, "randk", memory, 0.125, draw, t, norm * t, 0.9, 1, 2, 3, 4.5)
        for layer, norm in (("hidden1", 1.0), ("hidden2", 2.0))
        for memory in ("residual", "signed")
        for draw in (0, 1)
        for t in (1, 4)
    ]
    tables.write(store.folder / "crossterms.csv", CrossTerms, lines)
    sides = (("none", 0, 30, 2.0), ("input", 4, 20, 0.5), ("grad", 8, 10, 1.5))
    noise = [
        Noise("tiny", 50, layer, 64, 24, 16, 0.125, *one, 0.7)
        for layer in ("hidden1", "hidden2")
        for one in sides
    ]
    tables.write(store.folder / "noise.csv", Noise, noise)
    return store


@pytest.fixture
def markdown(filled):
    return report_of(filled)


def table(markdown, caption):
    """The cells of the table below a caption: {row: {column: text}}."""
    lines = markdown.split(caption)[1].strip().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines[: lines.index("")]]
    head = rows[0][1:]
    return {row[0]: dict(zip(head, row[1:], strict=True)) for row in rows[2:]}


def test_differences_are_in_their_cells(markdown):
    rows = table(markdown, "Difference to dense in accuracy, points.")
    # What has not been run takes no place.
    expected = ["priority + subspace", "topk + residual (paper)", "topk", "crs"]
    assert list(rows) == [*expected, "priority, dX sampled"]
    assert list(rows["topk"]) == ["1/4", "1/8", "1/32"]
    assert rows["priority + subspace"]["1/8"] == "−1.00 ± 0.00 (0 of 3 better)"
    # −1, 0, 1: t(0.975, 2)/√3 = 2.48; the best of the column.
    assert rows["topk"]["1/8"] == "**+0.00 ± 2.48** (1 of 3 better)"
    assert rows["crs"]["1/4"] == "**−1.00 ± ?** (0 of 1 better)"
    assert rows["topk + residual (paper)"]["1/32"] == "1 of 2 diverged"
    shown = sum(cell != "–" for row in rows.values() for cell in row.values())
    assert shown == 5
    assert "12.34" not in markdown


def test_dense_and_costs_are_in_their_cells(markdown):
    assert "Dense: 91.00 %, standard deviation 1.00, 3 seeds, 20 steps, learning rate 0.003." in (
        markdown
    )
    rows = table(markdown, "time of a step over dense's.")
    assert rows["priority + subspace"]["1/8"] == "0.250 (0.75× time)"
    assert rows["topk"]["1/8"] == "0.125 (not timed)"
    assert rows["topk"]["1/4"] == "–"


def test_the_overview_has_every_task_at_one_ratio(markdown):
    rows = table(markdown, "Difference to dense at r = 1/8")
    assert rows["priority + subspace"] == {"tiny": "−1.00 ± 0.00 (0 of 3 better)"}
    assert "wta" not in rows
    assert "priority, dX sampled" not in rows
    both = table(markdown, "dX cheaper too: difference to dense at 1/4")
    assert both["priority, dX sampled"] == {"tiny": "−2.00 ± ? (0 of 1 better)"}


def test_equal_time_is_unknown_without_dense_runs_of_fewer_steps(markdown):
    assert NO_EQUAL_TIME in markdown


# Dense: 84, 85 and 85 after 3/4 of the steps, 80, 81 and 82 after 1/2; 82, 84 and 86 with half the
# rows, in 0.6 of the time, and 90, 91 and 92 with all. The subspace: 89, 90 and 91.
SHORTER = {"1/2": (80.0, 81.0, 82.0), "3/4": (84.0, 85.0, 85.0)}
SMALLER = {"1/2": (82.0, 84.0, 86.0)}


@pytest.mark.parametrize(
    ("scheme", "found", "share", "expected"),
    [
        ("dense-shorter", SHORTER, 0.75, "+5.33 ± 1.43 (0.75× time)"),
        ("dense-shorter", SHORTER, 0.625, "+7.17 ± 0.72 (0.62× time)"),
        ("dense-shorter", SHORTER, 0.875, "+2.17 ± 0.72 (0.88× time)"),
        ("dense-shorter", SHORTER, 0.4, None),
        ("dense-shorter", SHORTER, 1.1, None),
        ("dense-smaller", SMALLER, 0.8, "+2.50 ± 1.24 (0.80× time)"),
        ("dense-smaller", SMALLER, 0.5, None),
    ],
)
def test_equal_time_compares_with_dense_of_as_many_seconds(filled, scheme, found, share, expected):
    for ratio, accuracies in found.items():
        for seed, accuracy in enumerate(accuracies):
            filled.add(*tiny.run(scheme, ratio, seed, accuracy=accuracy))
    smaller = {Cell("tiny", scheme, "1/2"): 0.6} if scheme == "dense-smaller" else {}
    add_times(filled, smaller | {OURS: share})
    page = report_of(filled)
    if expected is None:
        assert NO_EQUAL_TIME in page
    else:
        rows = table(page, "below, a step's time over dense's.")
        assert rows == {"priority + subspace, 1/8": {"tiny": expected}}


def test_clearly_worse_is_marked_on_the_page(filled, markdown):
    page = (filled.folder / "quality.html").read_text("utf-8")
    assert re.search(r'class="value bad">−1\.00 ± 0\.00', page)
    assert re.search(r'class="value best">\+0\.00 ± 2\.48', page)
    assert re.search(r'class="value bad">1 of 2 diverged', page)


def test_what_is_missing_is_said(markdown):
    assert f"Cells with fewer than 3 runs: tiny {CELLS - 3} of {CELLS}." in markdown
    assert f"{CELLS - 2} cells without step times." in markdown
    assert "1 run left out, because the task or the scheme has changed" in markdown
    assert "| diverged | 1 |" in markdown
    assert "| step times | A CPU, 2 threads |" in markdown


def test_tuning_marks_the_best_rate_and_the_one_used(markdown):
    section = markdown.split("## Learning rates tried for dense")[1]
    assert "| tiny | 0.003 (used) | 80.50 |" in section
    assert "| tiny | 0.006 | **85.50** |" in section
    assert "| tiny | 0.012 | diverged |" in section


def test_noise_has_a_row_for_every_layer(markdown):
    rows = table(markdown, "after 50 steps, 1/8 of dense's FLOPs")
    assert list(rows) == ["hidden1 (24 to 16)", "hidden2 (24 to 16)"]
    assert list(rows["hidden1 (24 to 16)"].values()) == [
        "0.7", "2 (q=0, K=30)", "**0.5** (q=4, K=20)", "1.5 (q=8, K=10)",
    ]  # fmt: skip


def test_cross_terms_are_over_layers_and_draws(markdown):
    rows = table(markdown, "T = 4: mean over layers, least and most below.")
    assert set(rows) == {"randk + residual", "randk + signed"}
    assert rows["randk + signed"]["‖S‖/‖D‖"] == "6 (4 to 8)"
    assert rows["randk + residual"]["unexplained"] == "3 (3 to 3)"
    assert rows["randk + residual"]["predicted"] == "4.5 (4.5 to 4.5)"


def test_charts_are_on_the_page_and_files_beside_the_markdown(filled):
    files = {path.name: path for path in report.write(filled.folder)}
    assert set(files) == {
        "quality.html", "quality.md", "tiny-curves.svg", "tiny-trade.svg", "tiny-crossterms-8.svg",
    }  # fmt: skip
    text = files["quality.md"].read_text("utf-8")
    page = files["quality.html"].read_text("utf-8")
    for name in [name for name in files if name.endswith(".svg")]:
        ElementTree.parse(files[name])
        assert f"]({name})" in text
    assert page.count("<svg ") == 3
    assert not re.search(r'src=|href="(?!#|https://arxiv\.org/)', page)


def test_curves_are_means_over_seeds_at_their_cost(filled):
    found = results.load(filled.folder)
    cell = Cell("tiny", "topk", "1/8")
    assert found.mean_curve(cell) == [(10, pytest.approx(90.9)), (20, pytest.approx(90.95))]
    assert found.step_ms(OURS) == 15
    assert found.step_ms(cell.dense) == 20
    assert found.step_ms(cell) is None


def test_nothing_at_all_is_a_page_too(store):
    files = report.write(store.folder)
    assert [path.name for path in files] == ["quality.html", "quality.md"]
    text = files[1].read_text("utf-8")
    assert text.count("Not run yet.") == 4
    assert f"tiny {CELLS} of {CELLS}" in text
