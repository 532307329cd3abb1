"""What is kept of a run, and what a kill or a changed task leaves of it."""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from memaop_triton.bench.studies.quality import running
from memaop_triton.bench.studies.quality.schemes import Cell
from memaop_triton.bench.studies.quality.store import RESULTS, Run, Store
from memaop_triton.bench.studies.quality.tables import TableError
from memaop_triton.bench.studies.quality.tasks import TASKS
from tests.bench.quality import tiny

ROOT = Path(__file__).parents[3]


def test_the_committed_results_are_where_commands_look_for_them():
    assert (RESULTS / "runs.csv").is_file()


def test_what_goes_in_comes_out(store):
    rows = [tiny.run("topk", "1/8", 1), tiny.run(), tiny.run("subspace", "1/32", accuracy=80.0)]
    for row, outcome in rows:
        store.add(row, outcome)
    assert store.runs() == [rows[1][0], rows[2][0], rows[0][0]]  # in the order of the tables
    curves = store.curves()
    assert len(curves) == 3
    points = curves["tiny", "subspace", "1/32", 0]
    assert [(point.step, point.accuracy) for point in points] == [(10, 79.9), (20, 79.95)]


def test_a_run_replaces_the_same_one(store):
    store.add(*tiny.run(accuracy=50.0))
    store.add(*tiny.run(accuracy=60.0))
    assert [run.accuracy for run in store.runs()] == [60.0]
    assert len(store.curves()["tiny", "dense", "1", 0]) == 2


def test_a_diverged_run_is_kept(store):
    nan = float("nan")
    store.add(*tiny.run(accuracy=nan, loss=nan, diverged_at=7))
    (run,) = store.runs()
    assert run.diverged_at == 7
    assert run.loss != run.loss


def test_a_torn_last_line_does_not_count(store):
    for seed in range(3):
        store.add(*tiny.run(seed=seed))
    path = store.folder / "runs.csv"
    whole = path.read_text()
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        path.write_text(whole[:-cut])
        assert [run.seed for run in store.runs()] == [0, 1]
    store.add(*tiny.run(seed=2))
    assert path.read_text() == whole


def test_a_broken_line_within_is_named(store):
    store.add(*tiny.run())
    path = store.folder / "runs.csv"
    path.write_text(path.read_text() + "tiny,dense,1\n")
    with pytest.raises(TableError, match=r"runs\.csv, line 3 is not a Run"):
        store.runs()
    path.write_text("a,b\n1,2\n")
    with pytest.raises(TableError, match="columns a, b, not task, scheme"):
        store.runs()


def test_a_curve_without_its_run_does_not_count(store):
    store.add(*tiny.run(seed=0))
    before = (store.folder / "runs.csv").read_text()
    store.add(*tiny.run(seed=1))
    (store.folder / "runs.csv").write_text(before)  # killed between the two files
    assert list(store.curves()) == [("tiny", "dense", "1", 0)]


def test_a_changed_task_is_run_again(store, monkeypatch):
    store.add(*tiny.run())
    jobs = [running.Job(Cell("tiny", "dense", "1"), 0)]
    assert running.pending(jobs, store.runs()) == []
    monkeypatch.setitem(TASKS, "tiny", tiny.with_lr(0.01))
    assert store.runs() == []
    assert store.curves() == {}
    assert len(store.stale()) == 1
    assert running.pending(jobs, store.runs()) == jobs


def test_a_curve_of_a_changed_task_is_not_mixed_with_the_old_run(store):
    old, new = tiny.run(), tiny.run(code="another")
    store.add(*old)
    runs = (store.folder / "runs.csv").read_text()
    store.add(*new)
    (store.folder / "runs.csv").write_text(runs)  # killed between the two files
    assert store.curves() == {("tiny", "dense", "1", 0): []}


def test_two_writers_lose_nothing(store):
    def write(first):
        for seed in range(first, first + 8):
            Store(store.folder).add(*tiny.run(seed=seed))

    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [run.seed for run in store.runs()] == list(range(16))
    assert len(store.curves()) == 16


OPTIONS = "--scheme priority --ratio 1/2 --ratio 1/8 --seeds 2 --threads 1"


def test_weight_gradients_of_a_smaller_batch_cost_less(task, store):
    run, _ = running.do(running.Job(Cell("tiny", "dense-smaller", "1/4"), 0), store, None)
    dense, _ = running.do(running.Job(Cell("tiny", "dense", "1"), 0), store, None)
    assert (run.weight_grads, dense.weight_grads) == (0.25, 1.0)
    assert run.backward == pytest.approx(0.25 * dense.backward)
    assert run.loss != dense.loss


WANTED = running.Wanted(schemes=["priority"], ratios=["1/2", "1/8"], seeds=2)


def command(folder):
    script = [sys.executable, str(Path(__file__).with_name("tiny.py")), "run", *OPTIONS.split()]
    return [*script, "--output", str(folder)]


@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_was(store):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    wanted = WANTED.jobs()
    process = subprocess.Popen(
        command(store.folder), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not store.runs():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    first = store.runs()
    assert len(first) < len(wanted), "it was not killed while it ran"

    second = subprocess.run(
        command(store.folder), env=environment, capture_output=True, text=True, check=True
    )
    assert f"{len(first)} of {len(wanted)} runs are there" in second.stdout
    runs = store.runs()
    assert len(runs) == len(wanted)
    # To the second, so they were not run again.
    assert [run for run in runs if run in first] == first

    whole = Store(store.folder.parent / "whole")
    for job in wanted:
        running.do(job, whole, None)
    assert [results(run) for run in runs] == [results(run) for run in whole.runs()]
    assert store.curves().keys() == whole.curves().keys()
    assert all(len(points) == 10 for points in store.curves().values())


def results(run: Run):
    # Another number of threads may round differently.
    return run._replace(seconds=0, loss=round(run.loss, 3), accuracy=round(run.accuracy))


def test_remaining_time_is_that_of_the_same_scheme_or_else_task(task):
    runs = [tiny.run()[0], tiny.run("topk", "1/8")[0]._replace(seconds=6.0)]
    job = running.Job
    same, other = Cell("tiny", "topk", "1/2"), Cell("tiny", "crs", "1/2")
    assert running.remaining_seconds([job(same, 0)] * 2, runs) == 12
    assert running.remaining_seconds([job(other, 0)], runs) == pytest.approx((1.5 + 6) / 2)
    assert running.remaining_seconds([job(other, 0)], []) is None
    assert running.remaining_seconds([], []) == 0


def test_dense_comes_first_and_all_seeds_of_a_cell_together(task):
    jobs = running.Wanted(schemes=["topk", "subspace"], ratios=["1/8"], seeds=2).jobs()
    assert [(job.cell.scheme, job.seed) for job in jobs] == [
        ("dense", 0), ("dense", 1), ("subspace", 0), ("subspace", 1), ("topk", 0), ("topk", 1),
    ]  # fmt: skip


def test_code_follows_all_that_determines_a_result(task, monkeypatch):
    cell = Cell("tiny", "subspace", "1/8")
    code = cell.code
    changes = {
        "steps": 21, "batch": 65, "left_dense": ("head", "hidden1"), "metric": "loss",
        "network": dataclasses.replace(task.network, sizes=(64, 24, 10)),
        "optimizer": dataclasses.replace(task.optimizer, warmup=0.1),
    }  # fmt: skip
    for name, value in changes.items():
        monkeypatch.setitem(TASKS, "tiny", dataclasses.replace(task, **{name: value}))
        assert cell.code != code, name
    monkeypatch.setitem(TASKS, "tiny", dataclasses.replace(task, title="Another"))
    assert cell.code == code
    others = {Cell("tiny", s, r).code for s in ("subspace", "priority") for r in ("1/8", "1/4")}
    assert len(others | {cell.dense.code}) == 5
