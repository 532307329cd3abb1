"""Predicted and measured progress on made-up runs whose progress is known."""

import math

import pytest

from memaop_triton.bench.studies.quality import progress, report, results, tables
from memaop_triton.bench.studies.quality.calibration import StepNoise
from memaop_triton.bench.studies.quality.progress import BEST, Formula, Pair
from memaop_triton.bench.studies.quality.schemes import Cell
from memaop_triton.bench.studies.quality.training import Outcome, Point, Score
from tests.bench.quality import tiny

PRIORITY, CRS = Cell("tiny", "priority", "1/4"), Cell("tiny", "crs", "1/4")


def add(store, scheme, ratio, seed, loss, curve=((10, 9.0), (20, 8.0))):
    row, _ = tiny.run(scheme, ratio, seed, loss=loss)
    points = tuple(Point(step, value, 50.0) for step, value in curve)
    store.add(row, Outcome(Score(loss, 90.0), points, 0, 1.0))


@pytest.fixture
def filled(store):
    """Dense: 1.0 and 1.2; 0.4 more after 3/4 of the steps, 1.4 more after 1/2, in the mean."""
    for seed, loss in ((0, 1.0), (1, 1.2), (2, 1.1)):
        add(store, "dense", "1", seed, loss, ((5, 4.0), (10, 3.0), (20, 1.0)))
    for seed, after, half in ((0, 1.3, 2.3), (1, 1.7, 2.7)):
        add(store, "dense-shorter", "3/4", seed, after)
        add(store, "dense-shorter", "1/2", seed, half)
    return store


def layer(cell=PRIORITY, step=10, name="hidden1", variance=0.5, square=1.0, others=2.0):
    where = ("input", 0, 16)
    return StepNoise(*cell, 0, cell.code, step, name, *where, variance, square, 0.1, others)


def noises(cell, *noise):
    """Lines of two equal layers, at steps 5, 10, …."""
    return [
        layer(cell, 5 * at, name, variance=one)
        for at, one in enumerate(noise, start=1)
        for name in ("hidden1", "hidden2")
    ]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ((0.0, 0.0), 1.0),
        ((0.2, 0.2), 7 / 8),  # halfway to 3/4 of the steps
        ((0.4, 0.4), 3 / 4),
        ((0.9, 0.9), 5 / 8),  # from there halfway to 1/2
        ((1.4, 1.4), 1 / 2),
        ((0.0, 0.4), 7 / 8),  # a mean over seeds
        ((-0.2, -0.2), 9 / 8),  # better than dense: the last line goes on
        ((1.6, 1.6), None),  # worse than half of the steps
    ],
)
def test_progress_at_the_end_lies_between_whole_dense_runs(filled, more, expected):
    for seed, one in enumerate(more):
        add(filled, "priority", "1/4", seed, (1.0, 1.2)[seed] + one)
    found = progress.progress_at_end(results.load(filled.folder), PRIORITY)
    if expected is None:
        assert found == []
    else:
        assert len(found) == 2
        assert sum(found) / 2 == pytest.approx(expected)


def test_there_is_none_without_shorter_runs_or_after_divergence(store, filled):
    nan = float("nan")
    filled.add(*tiny.run("priority", "1/4", 0, loss=nan, diverged_at=3))
    assert progress.progress_at_end(results.load(filled.folder), PRIORITY) == []
    add(filled, "priority", "1/4", 1, 1.2)
    assert progress.progress_at_end(results.load(filled.folder), PRIORITY) == [1.0]
    (filled.folder / "runs.csv").unlink()
    for scheme in ("dense", "priority"):
        add(filled, scheme, "1" if scheme == "dense" else "1/4", 0, 1.0)
    assert progress.progress_at_end(results.load(filled.folder), PRIORITY) == []


def test_progress_on_the_way_is_where_dense_had_the_loss(filled):
    # Dense of the seed: 4 after 5 steps, 3 after 10, 1 after 20.
    add(filled, "priority", "1/4", 0, 1.0, ((5, 9.0), (10, 3.5), (16, 2.0), (20, 1.5)))
    add(filled, "priority", "1/4", 1, 1.2, ((5, 9.0), (10, 3.0), (16, 0.5), (20, 1.0)))
    (pair,) = progress.pairs(results.load(filled.folder), noises(PRIORITY, 0.1))
    found = progress.progress_along(results.load(filled.folder), pair)
    assert found == [
        (10, pytest.approx((7.5 / 10 + 10 / 10) / 2)),
        (16, pytest.approx(15 / 16)),
        (20, pytest.approx((17.5 / 20 + 1) / 2)),
    ]


def test_pairs_know_their_scatter(filled):
    for seed, more in ((0, 0.1), (1, 0.2), (2, 0.3)):
        add(filled, "priority", "1/4", seed, (1.0, 1.2, 1.1)[seed] + more)
    add(filled, "crs", "1/4", 0, 1.4)
    lines = [*noises(CRS, 0.1, 0.2), *noises(PRIORITY, 0.3), layer()._replace(code="of before")]
    first, second = progress.pairs(results.load(filled.folder), lines)
    assert (first.cell, first.seeds, first.steps) == (PRIORITY, 3, (5,))
    assert first.measured == pytest.approx(1 - 0.25 / 2)
    # Progress of 0.9375, 0.875 and 0.8125; the other cell has one run of the same scatter.
    assert first.error == pytest.approx(0.0625 / math.sqrt(3))
    assert (second.cell, second.seeds, second.steps) == (CRS, 1, (5, 10))
    assert second.error == pytest.approx(0.0625)
    assert first.is_decided
    assert not second.is_decided


def test_one_run_each_is_never_decided(filled):
    add(filled, "priority", "1/4", 0, 1.0)
    (pair,) = progress.pairs(results.load(filled.folder), noises(PRIORITY, 0.1))
    assert math.isnan(pair.error)
    assert not pair.is_decided


def test_noise_of_a_step(task):
    layers = [layer(variance=0.5, square=1.0), layer(variance=6.0, square=3.0)]
    assert progress.total(layers) == pytest.approx(6.5 / 4)
    assert progress.total_of_all(layers) == pytest.approx(6.5 / 6)
    assert progress.capped(layers) == pytest.approx(3.5 / 4)
    assert progress.mean_of_layers(layers) == pytest.approx((0.5 + 1) / 2)


@pytest.mark.parametrize(
    ("formula", "values"),
    [
        (progress.at_dense_rate, (1.0, 0.7, 0.0)),
        (progress.at_retuned_rate, (1.0, 1 / 1.3, 1 / 4)),
        (progress.with_adam, (1.0, 2 / math.sqrt(1.3) - 1, 0.0)),
    ],
)
def test_formulas(formula, values):
    assert tuple(map(formula, (0.0, 0.3, 3.0))) == pytest.approx(values)


def pair(*noise, measured=0.5, task="tiny"):
    steps = tuple(range(5, 5 * len(noise) + 1, 5))
    layers = tuple([layer(variance=one)] for one in noise)
    return Pair(Cell(task, "priority", "1/4"), 3, measured, 0.01, steps, layers)


def test_a_prediction_is_the_mean_over_the_steps(task):
    linear = Formula(progress=lambda noise: noise)
    # 0.2 up to step 5, then straight to 0.4 at step 10, and on: steps 0 to 19.
    course = [0.2] * 6 + [0.24, 0.28, 0.32, 0.36] + [0.4] * 10
    one = pair(0.2, 0.4)
    assert linear.predict(one) == pytest.approx(sum(course) / 20)
    assert linear.predict(one, until=8) == pytest.approx(sum(course[:8]) / 8)
    assert linear.predict(one, factor=2.0) == pytest.approx(sum(course) / 40)
    assert Formula(progress=lambda noise: noise, early=7).predict(one) == pytest.approx(0.4)
    assert Formula(progress=lambda noise: noise, early=5).predict(one) == pytest.approx(0.2)
    assert Formula(progress=lambda noise: noise, early=15).predict(one) == pytest.approx(0.4)
    assert BEST.predict(pair(0.25)) == pytest.approx(0.8)


def test_steps_count_by_their_rate(task, monkeypatch):
    rates = [1.0] * 10 + [0.5] * 10
    monkeypatch.setattr(type(task.optimizer), "factor", lambda self, step, steps: rates[step])
    one = pair(0.0, 0.0, 1.0)
    course = [0.0] * 11 + [0.2, 0.4, 0.6, 0.8] + [1.0] * 5
    for power in (1, 2):
        weighted = sum(value * rate**power for value, rate in zip(course, rates, strict=True))
        expected = weighted / sum(rate**power for rate in rates)
        found = Formula(progress=lambda noise: noise, power=power).predict(one)
        assert found == pytest.approx(expected)


def test_a_factor_is_fitted_to_the_other_tasks(task, monkeypatch):
    cautious = Formula(progress.capped, progress.at_dense_rate)
    for name in ("other", "third"):
        monkeypatch.setitem(progress.TASKS, name, task)
    known = [
        pair(noise, measured=1 - noise / factor, task=name)
        for name, factor in (("tiny", 4.0), ("other", 2.0), ("third", 2.0))
        for noise in (0.1, 0.4, 0.8)
    ]
    plain = progress.without_fit(cautious, known)
    assert plain.misses[:3] == pytest.approx([-0.1 * 3 / 4, -0.4 * 3 / 4, -0.8 * 3 / 4])
    assert plain.within == pytest.approx(3 / 9)
    fit = progress.leave_one_out(cautious, known)
    assert fit.by_task["tiny"] == pytest.approx(2.0, rel=0.03)
    assert 2.0 < fit.by_task["other"] == fit.by_task["third"] < 4.0
    assert 2.0 < fit.factor < fit.by_task["other"]
    # The task that was left out misses by what the others say of it.
    assert fit.misses[2] == pytest.approx(0.8 / 4 - 0.8 / 2, abs=0.02)
    assert fit.rms == pytest.approx(math.sqrt(sum(m * m for m in fit.misses) / 9))


def test_the_page_shows_predictions_beside_what_came(filled):
    for seed, loss in ((0, 1.2), (1, 1.4), (2, 1.32)):
        add(filled, "priority", "1/4", seed, loss)
    path = filled.folder / "calibration.csv"
    tables.update(path, StepNoise, noises(PRIORITY, 0.25, 0.25), lambda one: (one.step, one.layer))
    _, markdown, *pictures = report.write(filled.folder)
    text = markdown.read_text("utf-8")
    assert "calibration.svg" in {path.name for path in pictures}
    assert "| tiny | priority, 1/4 | 0.250 | 0.871 (± 0.004, 3 pairs) | 0.800 | −0.07 |" in text
    assert "1 decided setting; within 0.1" in text
    assert "−0.07 (tiny priority 1/4)" in text
