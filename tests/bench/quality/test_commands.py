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


def test_a_cell_is_timed_once_on_each_machine(task, clock, tmp_path):
    arguments = "time", "--scheme", "subspace", "--ratio", "1/8", "--rounds", 4
    for _ in range(2):
        assert invoke("--output", tmp_path, *arguments).exit_code == 0
    assert clock["ours"] == 4 + 32
    path = tmp_path / "seconds.csv"
    (one,) = tables.read(path, StepTime)
    other = one._replace(threads=one.threads + 1)
    step_times.add(path, other)
    step_times.add(path, one._replace(rounds=7))
    times = tables.read(path, StepTime)
    assert times == [one._replace(rounds=7), other]
    assert step_times.is_timed(one.cell, times)
    assert not step_times.is_timed(one.cell, [other, one._replace(code="other")])


def test_best_rate_follows_the_metric():
    nan = float("nan")
    found = [tiny.trial(0.1, 80.0), tiny.trial(0.2, 90.0), tiny.trial(0.3, 85.0)]
    assert tuning.best_rate(tiny.TASK, [tiny.trial(0.05, nan), *found]) == 0.2
    assert tuning.best_rate(tiny.TASK, [*found, tiny.trial(0.2, 70.0, seed=1)]) == 0.3
    assert tuning.best_rate(tiny.TASK, [*found, tiny.trial(0.2, nan, seed=1)]) == 0.3
    assert tuning.best_rate(tiny.TASK, [found[1]._replace(code="other")]) is None


def test_tuning_goes_on_where_it_was(task, tmp_path, monkeypatch):
    taken = []

    def train(trainer, source):
        lr = trainer.task.optimizer.lr
        taken.append((lr, trainer.seed))
        return Outcome(Score(1.0, 100 * lr), (), 0, 1.0)

    monkeypatch.setattr(tuning, "train", train)
    path = tmp_path / "tuning.csv"
    output = invoke("--output", tmp_path, "tune").output
    assert "tiny: 0.012 is best, 0.003 is used" in output
    every = [(lr, s) for lr in (0.00075, 0.0015, 0.003, 0.006, 0.012) for s in (0, 1)]
    assert taken == every
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:8]))
    assert len(list(tuning.tune(task, path, None))) == 3
    assert taken == every + every[7:]
    assert path.read_text() == whole


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "--scheme", "subspaces"), "Did you mean 'subspace'?"),
        (("time", "--rounds", "3"), "greater than or equal to 4"),
        (("--data-dir", ".", "run", "--task", "vit"), "has no file fashion_mnist.npz"),
    ],
)
def test_what_cannot_be_is_told(arguments, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["quality", *arguments])
    with pytest.raises(SystemExit) as stopped:
        commands.main()
    assert stopped.value.code == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_stopped_run_goes_on_where_it_was_and_is_reported(store, monkeypatch):
    command = ("run", "--scheme", "topk", "--ratio", "1/2", "--seeds", 2)
    output = ("--output", store.folder)
    step, taken = Trainer.step, []

    def until_stopped(self, batch):
        taken.append(batch)
        if len(taken) == 2.5 * tiny.TASK.steps:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", until_stopped)
    assert "0 of 4 runs are there" in invoke(*output, *command).output
    first = store.runs()
    assert [(run.scheme, run.seed) for run in first] == [("dense", 0), ("dense", 1)]
    assert "2 of 4 runs are there" in invoke(*output, *command).output
    runs = store.runs()
    assert runs[:2] == first  # to the second, so they were not run again
    assert [(run.scheme, run.seed) for run in runs[2:]] == [("topk", 0), ("topk", 1)]
    assert {len(points) for by in store.curves().values() for points in by.values()} == {10}
    assert "quality.html" in invoke(*output, "report").output
    assert (store.folder / "tiny-curves.svg").exists()


def test_noise_is_measured_for_what_was_run_or_named(store):
    output = ("--output", store.folder)
    assert invoke(*output, "calibrate").output == ""  # nothing has been run
    invoke(
        *output, "run", "--scheme", "priority", "--scheme", "topk", "--ratio", "1/4", "--seeds", 1
    )
    first = invoke(*output, "calibrate").output
    assert [line[:24] for line in first.splitlines()[::9]] == [
        "tiny step 2: priority 1/",
        "tiny step 20: priority 1",
    ]
    assert "topk" not in first
    assert invoke(*output, "calibrate").output == ""
    named = invoke(*output, "calibrate", "--scheme", "budget", "--ratio", "1/2").output
    assert named.count("budget 1/2") == 10
    assert "priority" not in named
