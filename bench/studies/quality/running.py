"""The runs that are still to do, one after the other."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from memaop_triton.bench.studies.quality import data, flops
from memaop_triton.bench.studies.quality.flops import Flops
from memaop_triton.bench.studies.quality.schemes import DENSE, Cell, cells
from memaop_triton.bench.studies.quality.store import Run, Store
from memaop_triton.bench.studies.quality.tasks import TASKS
from memaop_triton.bench.studies.quality.training import Outcome, train


class Job(NamedTuple):
    """One run."""

    cell: Cell
    seed: int


class Wanted(NamedTuple):
    """Which runs are wanted; dense comes along with whatever is compared with it.

    Attributes:
        tasks: Names; all if empty.
        schemes: Names; all if empty.
        ratios: As in `"1/8"`; all if empty.
        seeds: Runs of every cell, from seed 0.
    """

    tasks: Sequence[str] = ()
    schemes: Sequence[str] = ()
    ratios: Sequence[str] = ()
    seeds: int = 3

    def cells(self) -> list[Cell]:
        """Task by task, dense first, then by importance."""
        chosen = [cell for name in self.tasks or TASKS for cell in cells(name)]
        return [cell for cell in chosen if cell.scheme == DENSE or self._takes(cell)]

    def jobs(self) -> list[Job]:
        """All seeds of a cell together."""
        return [Job(cell, seed) for cell in self.cells() for seed in range(self.seeds)]

    def _takes(self, cell: Cell) -> bool:
        return (not self.schemes or cell.scheme in self.schemes) and (
            not self.ratios or cell.ratio in self.ratios
        )


def pending(jobs: Iterable[Job], runs: Iterable[Run]) -> list[Job]:
    """The jobs that no run has done."""
    done = {Job(run.cell, run.seed) for run in runs}
    return [job for job in jobs if job not in done]


def do(
    job: Job, store: Store, data_dir: Path | None, progress: Callable[[int], None] = lambda _: None
) -> tuple[Run, Outcome]:
    """Train, count, and keep the result."""
    task, config = job.cell.problem, job.cell.config
    source = data.load(task, data_dir)
    counted = _flops(job.cell, data_dir)
    allocated = job.cell.allocated
    outcome = train(task, config, job.seed, source, progress, allocated=allocated)
    run = Run(
        *job.cell,
        job.seed,
        job.cell.code,
        *outcome.score,
        outcome.diverged_at,
        *counted,
        outcome.seconds,
    )
    store.add(run, outcome)
    return run, outcome


@functools.cache
def _flops(cell: Cell, data_dir: Path | None) -> Flops:
    task = cell.problem
    batch = data.first_batch(data.load(task, data_dir), task.batch)
    counted = flops.count(task, cell.config, batch)
    share = task.batch / TASKS[cell.task].batch
    return counted._replace(weight_grads=share * counted.weight_grads)


def remaining_seconds(jobs: Iterable[Job], runs: Iterable[Run]) -> float | None:
    """What the jobs should take, by runs of the same scheme, or else of the same task.

    `None` if there is a task of which no run has been done.
    """
    by_scheme: dict[tuple[str, str], list[float]] = {}
    by_task: dict[str, list[float]] = {}
    for run in runs:
        by_scheme.setdefault((run.task, run.scheme), []).append(run.seconds)
        by_task.setdefault(run.task, []).append(run.seconds)
    total = 0.0
    for job in jobs:
        cell = job.cell
        known = by_scheme.get((cell.task, cell.scheme)) or by_task.get(cell.task)
        if known is None:
            return None
        total += statistics.median(known)
    return total
