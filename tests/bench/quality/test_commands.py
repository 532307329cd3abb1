"""Step times, learning rates, and what the command line refuses."""

import pytest
from typer.testing import CliRunner

from memaop_triton.bench.studies.quality import commands, step_times, tables, tuning
from memaop_triton.bench.studies.quality.schemes import Cell
from memaop_triton.bench.studies.quality.step_times import StepTime
from memaop_triton.bench.studies.quality.training import Outcome, Score, Trainer
from memaop_triton.bench.studies.quality.tuning import Trial
from tests.bench.quality import tiny


@pytest.fixture
def clock(monkeypatch):
    """A step takes 10 ms dense and 5 ms otherwise, and every 8th of these 13 ms."""
    now = [0.0]
    taken = {True: 0, False: 0}

    def step(self, batch):
        is_dense = not hasattr(self.model.hidden1, "config")
        taken[is_dense] += 1
        is_refresh = not is_dense and taken[is_dense] % 8 == 0
        now[0] += 0.010 if is_dense else 0.013 if is_refresh else 0.005
        return 0.0

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(step_times.clock, "perf_counter", lambda: now[0])
    return taken


def test_a_refresh_counts_for_its_share(task, clock):
    one = step_times.measure(Cell("tiny", "subspace", "1/8"), None, rounds=5)
    assert one.dense == pytest.approx(10)
    assert one.ms == one.q1 == pytest.approx(6)
    assert one.share == pytest.approx(0.6)
    assert clock == {True: 44, False: 44}


def test_without_refresh_rounds_are_single_steps(task, clock):
    one = step_times.measure(Cell("tiny", "priority", "1/8"), None)
    assert (one.rounds, one.ms, one.q3) == (32, pytest.approx(5), pytest.approx(5))
    assert clock[True] == 36


def test_what_is_allocated_is_timed_once_it_has_been(task, clock):
    one = step_times.measure(Cell("tiny", "budget-allocated", "1/8"), None, rounds=4)
    assert one.share == pytest.approx(0.6)
    assert clock == {True: 50 + 32, False: 50 + 32}


def test_a_smaller_batch_is_timed_beside_the_whole_one(task, monkeypatch):
    now, sizes = [0.0], []

    def step(self, batch):
        assert len(batch.x) == len(batch.y) == self.task.batch
        sizes.append(len(batch.y))
        now[0] += 1e-4 * len(batch.y)
        return 0.0

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(step_times.clock, "perf_counter", lambda: now[0])
    one = step_times.measure(Cell("tiny", "dense-smaller", "1/4"), None, rounds=4)
    assert (one.dense, one.ms, one.share) == pytest.approx((6.4, 1.6, 0.25))
    assert sorted(sizes) == [16] * 8 + [64] * 8


def test_the_time_command_takes_the_number_of_rounds(task, clock, tmp_path):
    cell = ["--task", "tiny", "--scheme", "subspace", "--ratio", "1/8"]
    arguments = ["time", *cell, "--rounds", "4", "--output", str(tmp_path)]
    result = CliRunner().invoke(commands.app, arguments)
    assert result.exit_code == 0, result.output
    (one,) = tables.read(tmp_path / "seconds.csv", StepTime)
    assert (one.rounds, one.share) == (4, pytest.approx(0.6))
    assert CliRunner().invoke(commands.app, [*arguments[:-3], "3"]).exit_code == 2


def test_a_time_is_of_one_machine_and_replaces_its_like(task, tmp_path, monkeypatch):
    path, cell = tmp_path / "seconds.csv", Cell("tiny", "priority", "1/8")
    first = step_times.measure(cell, None, rounds=4)
    step_times.add(path, first)
    step_times.add(path, first._replace(threads=first.threads + 1))
    step_times.add(path, first._replace(rounds=7))
    times = tables.read(path, StepTime)
    assert [(one.threads, one.rounds) for one in times] == [
        (first.threads, 7), (first.threads + 1, 4),
    ]  # fmt: skip
    assert step_times.is_timed(cell, times)
    assert not step_times.is_timed(cell, times[1:])
    assert not step_times.is_timed(cell, [first._replace(code="other")])


def trials(*scores):
    found = []
    for lr, accuracy in scores:
        code = tuning.code_of(tuning.with_rate(tiny.TASK, lr), None)
        found.append(Trial("tiny", lr, 0, code, 100 - accuracy, accuracy))
    return found


def test_best_rate_follows_the_metric():
    nan = float("nan")
    diverged, *found = trials((0.05, nan), (0.1, 80.0), (0.2, 90.0), (0.3, 85.0))
    assert tuning.best_rate(tiny.TASK, [diverged, *found]) == 0.2
    assert tuning.best_rate(tiny.TASK, [*found, found[1]._replace(seed=1, accuracy=70.0)]) == 0.3
    assert tuning.best_rate(tiny.TASK, [*found, found[1]._replace(seed=1, accuracy=nan)]) == 0.3
    assert tuning.best_rate(tiny.TASK, [found[1]._replace(code="other")]) is None
    assert tuning.best_rate(tiny.TASK, []) is None


def test_tuning_goes_on_where_it_was(task, tmp_path, monkeypatch):
    taken = []

    def train(candidate, config, seed, source):
        assert config is None
        taken.append((candidate.optimizer.lr, seed))
        return Outcome(Score(1.0, 100 * candidate.optimizer.lr), (), 0, 1.0)

    monkeypatch.setattr(tuning, "train", train)
    monkeypatch.setattr(tuning.data, "_TUNING_IMAGES", 100)
    path = tmp_path / "tuning.csv"
    assert tuning.tune(task, path, None) == 0.012
    assert sorted(taken) == [
        (lr, s) for lr in (0.00075, 0.0015, 0.003, 0.006, 0.012) for s in (0, 1)
    ]
    rows = tables.read(path, Trial)
    tables.write(path, Trial, rows[:7])
    del taken[:]
    tuning.tune(task, path, None)
    assert taken == [(0.006, 1), (0.012, 0), (0.012, 1)]
    assert tables.read(path, Trial) == rows


def test_unknown_names_are_refused_with_the_nearest():
    result = CliRunner().invoke(commands.app, ["run", "--scheme", "subspaces"])
    assert result.exit_code == 2
    assert "Did you mean 'subspace'?" in " ".join(result.output.replace("│", " ").split())


def test_missing_data_is_told_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        "sys.argv", ["quality", "run", "--task", "vit", "--data-dir", str(tmp_path)]
    )
    with pytest.raises(SystemExit) as stopped:
        commands.main()
    assert stopped.value.code == 2
    assert "has no file fashion_mnist.npz" in capsys.readouterr().err


def test_run_and_report(store):
    arguments = ["--scheme", "topk", "--ratio", "1/2", "--seeds", "1", "--output"]
    result = CliRunner().invoke(commands.app, ["run", *arguments, str(store.folder)])
    assert result.exit_code == 0, result.output
    assert "0 of 2 runs are there" in result.output
    assert [run.scheme for run in store.runs()] == ["dense", "topk"]
    result = CliRunner().invoke(commands.app, ["report", "--output", str(store.folder)])
    assert "quality.html" in result.output
    assert (store.folder / "tiny-curves.svg").exists()
