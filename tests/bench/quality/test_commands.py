"""Step times, learning rates, and what the command line refuses."""

import pytest
from typer.testing import CliRunner

from memaop_triton.bench.studies.quality import commands, step_times, tables, tuning
from memaop_triton.bench.studies.quality.schemes import Cell
from memaop_triton.bench.studies.quality.step_times import StepTime
from memaop_triton.bench.studies.quality.training import Outcome, Score, Trainer
from tests.bench.quality import tiny


@pytest.fixture
def clock(monkeypatch):
    """64 rows take 10 ms dense and 5 ms otherwise, and every 8th time 13 ms; the steps taken."""
    now = [0.0]
    taken = {"dense": 0, "ours": 0}

    def step(self, batch):
        is_dense = not hasattr(self.model.hidden1, "config")
        kind = "dense" if is_dense and len(batch.x) == 64 else "ours"
        taken[kind] += 1
        is_refresh = not is_dense and taken[kind] % 8 == 0
        seconds = 0.010 if is_dense else 0.013 if is_refresh else 0.005
        now[0] += seconds * len(batch.x) / 64
        return 0.0

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(step_times.clock, "perf_counter", lambda: now[0])
    return taken


@pytest.mark.parametrize(
    ("scheme", "ratio", "rounds", "ms", "steps"),
    [
        ("subspace", "1/8", 5, 6, 4 + 40),  # a refresh counts for its share
        ("priority", "1/8", None, 5, 4 + 32),  # rounds are single steps
        ("budget-allocated", "1/8", 4, 6, 50 + 32),  # once it has been allocated
        ("dense-smaller", "1/4", 4, 2.5, 4 + 4),  # beside the whole batch
    ],
)
def test_a_step_is_timed_beside_dense(task, clock, scheme, ratio, rounds, ms, steps):
    one = step_times.measure(Cell("tiny", scheme, ratio), None, rounds)
    assert one.rounds == (rounds or 32)
    assert (one.dense, one.ms, one.q1, one.q3) == pytest.approx((10, ms, ms, ms))
    assert one.share == pytest.approx(ms / 10)
    assert clock == {"dense": steps, "ours": steps}


def invoke(*arguments):
    return CliRunner().invoke(commands.app, [str(one) for one in arguments])


def test_the_time_command_times_what_is_not_timed_yet(task, clock, tmp_path):
    arguments = ("--output", tmp_path, "time", "--scheme", "subspace", "--ratio", "1/8", "--rounds")
    result = invoke(*arguments, 4)
    assert result.exit_code == 0, result.output
    (one,) = tables.read(tmp_path / "seconds.csv", StepTime)
    assert (one.rounds, one.share) == (4, pytest.approx(0.6))
    taken = dict(clock)
    assert invoke(*arguments, 4).exit_code == 0
    assert clock == taken
    assert invoke(*arguments, 3).exit_code == 2


def test_a_time_is_of_one_machine_and_replaces_its_like(task, clock, tmp_path):
    path, cell = tmp_path / "seconds.csv", Cell("tiny", "priority", "1/8")
    first = step_times.measure(cell, None, rounds=4)
    other = first._replace(threads=first.threads + 1)
    for one in (first, other, first._replace(rounds=7)):
        step_times.add(path, one)
    times = tables.read(path, StepTime)
    found = [(one.threads, one.rounds) for one in times]
    assert found == [(first.threads, 7), (other.threads, 4)]
    assert step_times.is_timed(cell, times)
    assert not step_times.is_timed(cell, [times[1], first._replace(code="other")])


def test_best_rate_follows_the_metric():
    nan = float("nan")
    found = [tiny.trial(0.1, 80.0), tiny.trial(0.2, 90.0), tiny.trial(0.3, 85.0)]
    assert tuning.best_rate(tiny.TASK, [tiny.trial(0.05, nan), *found]) == 0.2
    assert tuning.best_rate(tiny.TASK, [*found, tiny.trial(0.2, 70.0, seed=1)]) == 0.3
    assert tuning.best_rate(tiny.TASK, [*found, tiny.trial(0.2, nan, seed=1)]) == 0.3
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
    output = invoke("--output", tmp_path, "tune").output
    assert "tiny: 0.012 is best, 0.003 is used" in output
    assert taken == [(lr, s) for lr in (0.00075, 0.0015, 0.003, 0.006, 0.012) for s in (0, 1)]
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:8]))
    del taken[:]
    assert len(list(tuning.tune(task, path, None))) == 3
    assert taken == [(0.006, 1), (0.012, 0), (0.012, 1)]
    assert path.read_text() == whole


def test_unknown_names_are_refused_with_the_nearest():
    result = invoke("run", "--scheme", "subspaces")
    assert result.exit_code == 2
    assert "Did you mean 'subspace'?" in " ".join(result.output.replace("│", " ").split())


def test_missing_data_is_told_in_one_line(monkeypatch, capsys, tmp_path):
    arguments = ["quality", "--data-dir", str(tmp_path), "run", "--task", "vit"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        commands.main()
    assert stopped.value.code == 2
    assert "has no file fashion_mnist.npz" in capsys.readouterr().err


def test_run_and_report(store):
    output = ("--output", store.folder)
    result = invoke(*output, "run", "--scheme", "topk", "--ratio", "1/2", "--seeds", 1)
    assert result.exit_code == 0, result.output
    assert "0 of 2 runs are there" in result.output
    assert [run.scheme for run in store.runs()] == ["dense", "topk"]
    assert "quality.html" in invoke(*output, "report").output
    assert (store.folder / "tiny-curves.svg").exists()
