"""What is kept of a run, and what a kill or a changed task leaves of it."""

import dataclasses
import threading

import pytest

from memaop_triton.bench.studies.quality import running
from memaop_triton.bench.studies.quality.running import Job
from memaop_triton.bench.studies.quality.schemes import Cell
from memaop_triton.bench.studies.quality.store import Store
from memaop_triton.bench.studies.quality.tables import TableError
from memaop_triton.bench.studies.quality.tasks import TASKS
from tests.bench.quality import tiny

DENSE = Cell("tiny", "dense", "1")


def test_what_goes_in_comes_out(store):
    nan = float("nan")
    rows = [
        tiny.run("topk", "1/8", 1),
        tiny.run("topk", "1/8", 1, accuracy=50.0),  # in place of the first
        tiny.run(loss=nan, accuracy=nan, diverged_at=7),
        tiny.run("subspace", "1/32", accuracy=80.0),
    ]
    for row, outcome in rows:
        store.add(row, outcome)
    dense, *others = store.runs()
    assert others == [rows[3][0], rows[1][0]]  # in the order of the tables
    assert (dense.cell, dense.diverged_at) == (DENSE, 7)
    assert dense.loss != dense.loss
    curves = store.curves()
    assert {len(points) for by_seed in curves.values() for points in by_seed.values()} == {2}
    points = curves[Cell("tiny", "subspace", "1/32")][0]
    assert [(point.step, point.accuracy) for point in points] == [(10, 79.9), (20, 79.95)]


def test_a_broken_line_is_named(store):
    store.add(*tiny.run())
    path = store.folder / "runs.csv"
    path.write_text(path.read_text() + "tiny,dense,1\n")
    with pytest.raises(TableError, match=r"runs\.csv, line 3 is not a Run"):
        store.runs()
    path.write_text("a,b\n1,2\n")
    with pytest.raises(TableError, match="columns a, b, not task, scheme"):
        store.runs()


@pytest.mark.parametrize(("second", "left"), [({"seed": 1}, 2), ({"code": "another"}, 0)])
def test_a_curve_without_its_run_does_not_count(store, second, left):
    store.add(*tiny.run())
    before = (store.folder / "runs.csv").read_text()
    store.add(*tiny.run(**second))
    (store.folder / "runs.csv").write_text(before)  # killed between the two files
    found = store.curves()
    assert list(found) == [DENSE]
    assert {seed: len(points) for seed, points in found[DENSE].items()} == {0: left}


def test_a_changed_task_is_run_again(store, monkeypatch):
    store.add(*tiny.run())
    assert running.pending([DENSE], 1, store.runs()) == []
    monkeypatch.setitem(TASKS, "tiny", tiny.with_lr(0.01))
    assert (store.runs(), store.curves(), store.stale()) == ([], {}, 1)
    assert running.pending([DENSE], 1, store.runs()) == [Job(DENSE, 0)]


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
    assert list(map(len, store.curves()[DENSE].values())) == [2] * 16


def test_weight_gradients_of_a_smaller_batch_cost_less(store):
    run = running.do(Job(Cell("tiny", "dense-smaller", "1/4"), 0), store, None)
    dense = running.do(Job(DENSE, 0), store, None)
    assert (run.weight_grads, dense.weight_grads) == (0.25, 1.0)
    assert run.backward == pytest.approx(0.25 * dense.backward)


def test_code_follows_all_that_determines_a_result(task, monkeypatch):
    cell = Cell("tiny", "subspace", "1/8")
    code = cell.code
    changes = {
        "steps": 21,
        "batch": 65,
        "left_dense": ("head", "hidden1"),
        "metric": "loss",
        "network": dataclasses.replace(task.network, sizes=(64, 24, 10)),
        "optimizer": dataclasses.replace(task.optimizer, warmup=0.1),
    }
    for name, value in changes.items():
        monkeypatch.setitem(TASKS, "tiny", dataclasses.replace(task, **{name: value}))
        assert cell.code != code, name
    monkeypatch.setitem(TASKS, "tiny", dataclasses.replace(task, title="Another"))
    assert cell.code == code
    others = {Cell("tiny", s, r).code for s in ("subspace", "priority") for r in ("1/8", "1/4")}
    assert len(others | {cell.dense.code}) == 5
