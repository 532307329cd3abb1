"""The runs that are still to do, one after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from memaop_triton.bench.studies.quality import data, flops
from memaop_triton.bench.studies.quality.flops import Flops
from memaop_triton.bench.studies.quality.schemes import DENSE, SCHEMES, Cell, cells
from memaop_triton.bench.studies.quality.store import Run, Store
from memaop_triton.bench.studies.quality.tasks import TASKS
from memaop_triton.bench.studies.quality.training import Outcome, train

SEEDS = 3  # of every cell by default


class Job(NamedTuple):
    """One run."""

    cell: Cell
    seed: int


def wanted(
    tasks: Collection[str] | None = None,
    schemes: Collection[str] | None = None,
    ratios: Collection[str] | None = None,
) -> list[Cell]:
    """The cells of these tasks, schemes and ratios, of all where none are named.

    Dense is included with all cells that are compared with it: task by task, dense first, then by
    importance.
    """
    return [
        cell
        for name in tasks or TASKS
        for cell in cells(name)
        if cell.scheme == DENSE
        or ((not schemes or cell.scheme in schemes) and (not ratios or cell.ratio in ratios))
    ]


def pending(cells: Iterable[Cell], seeds: int, runs: Iterable[Run]) -> list[Job]:
    """What no run has done, all seeds of a cell together."""
    done = {Job(run.cell, run.seed) for run in runs}
    jobs = [Job(cell, seed) for cell in cells for seed in range(seeds)]
    return [job for job in jobs if job not in done]


def do(
    job: Job, store: Store, data_dir: Path | None, progress: Callable[[int], None] = lambda _: None
) -> Run:
    """Train, count, and keep the result."""
    cell, seed = job
    task = cell.problem.located(data_dir)
    source = data.load(task, data_dir)
    counted = _flops(cell, data_dir)
    outcome = train(cell.trainer(task, seed), source, progress)
    return keep(job, counted, outcome, store)


def keep(job: Job, counted: Flops, outcome: Outcome, store: Store) -> Run:
    """Put what a run gave into the store."""
    cell, seed = job
    run = Run(
        *cell,
        seed,
        cell.code,
        *outcome.score,
        outcome.diverged_at,
        *counted,
        outcome.seconds,
    )
    store.add(run, outcome)
    return run


@functools.cache
def _flops(cell: Cell, data_dir: Path | None) -> Flops:
    task = cell.problem.located(data_dir)
    batch = data.first_batch(data.load(task, data_dir), task.batch)
    scheme = SCHEMES[cell.scheme]
    if scheme.decides or scheme.rotates:  # their steps are not alike
        return flops.UNKNOWN
    counted = flops.count(task, cell.config, batch)
    share = task.batch / TASKS[cell.task].batch
    return counted._replace(weight_grads=share * counted.weight_grads)
