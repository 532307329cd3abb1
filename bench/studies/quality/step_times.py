"""How long a training step takes under a scheme and, in turns with it, dense."""

from __future__ import annotations

import random
import statistics
import time as clock
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from memaop_triton.bench.machine import here
from memaop_triton.bench.studies.quality import data, tables
from memaop_triton.bench.studies.quality.batches import Batch
from memaop_triton.bench.studies.quality.schemes import Cell
from memaop_triton.bench.studies.quality.tasks import TASKS
from memaop_triton.bench.studies.quality.training import ALLOCATE_EVERY, Trainer

WARM_UP = 4
ROUNDS = 32
# A refresh of the subspace makes one step of several longer: rounds are that many steps then.
LONG_ROUNDS = 10


class StepTime(NamedTuple):
    """A line of `seconds.csv`: medians and quartiles over rounds, of milliseconds per step.

    Attributes:
        task: Its name.
        scheme: Its name.
        ratio: As in `"1/8"`.
        code: Of task and configuration.
        cpu: Its name and vector instructions.
        threads: Of PyTorch.
        rounds: Each the time of a few steps under the scheme and of as many dense ones, in turns.
        dense: Median, dense.
        dense_q1: Lower quartile.
        dense_q3: Upper quartile.
        ms: Median, under the scheme.
        q1: Lower quartile.
        q3: Upper quartile.
        share: Median of the scheme's time over dense's in the same round.
        share_q1: Lower quartile.
        share_q3: Upper quartile.
    """

    task: str
    scheme: str
    ratio: str
    code: str
    cpu: str
    threads: int
    rounds: int
    dense: float
    dense_q1: float
    dense_q3: float
    ms: float
    q1: float
    q3: float
    share: float
    share_q1: float
    share_q3: float

    @property
    def cell(self) -> Cell:
        """What it is a time of."""
        return Cell(*self[:3])


def is_timed(cell: Cell, times: Sequence[StepTime]) -> bool:
    """Whether one of the times is of this cell, machine and number of threads."""
    wanted = (cell.code, *here())
    return any(one.cell == cell and (one.code, one.cpu, one.threads) == wanted for one in times)


def add(path: Path, time: StepTime) -> None:
    """Write a time into the file, in place of one of the same cell, machine and threads."""
    tables.update(path, StepTime, [time], lambda one: (*one.cell.place, one.cpu, one.threads))


def measure(cell: Cell, data_dir: Path | None, rounds: int | None = None) -> StepTime:
    """Time a cell whose steps are not dense's; `rounds` as by the memory if `None`.

    One that `allocate_` spreads a budget for is timed after it has done so.
    """
    task, own = (one.located(data_dir) for one in (TASKS[cell.task], cell.problem))
    config = cell.config
    assert cell.has_own_steps
    period = 1 if config is None else config.period
    rounds = rounds or (ROUNDS if period == 1 else LONG_ROUNDS)
    trainers = {True: Trainer(task, None, 0), False: cell.trainer(own, 0)}
    warm_up = WARM_UP if cell.allocated is None else ALLOCATE_EVERY
    steps = warm_up + rounds * period
    source = data.load(task, data_dir)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    generator = torch.Generator().manual_seed(0)
    order = random.Random(0)
    for batch in source.batches(task.batch, steps, generator):
        for is_dense in order.sample((True, False), 2):
            rows = task.batch if is_dense else own.batch
            some = Batch(batch.x[:rows], batch.y[:rows])
            start = clock.perf_counter()
            trainers[is_dense].step(some)
            seconds[is_dense].append(clock.perf_counter() - start)
    dense, ours = (_means(seconds[kind][warm_up:], period) for kind in (True, False))
    shares = [one / other for one, other in zip(ours, dense, strict=True)]
    values = (*_quartiles(dense, 1e3), *_quartiles(ours, 1e3), *_quartiles(shares))
    return StepTime(*cell, cell.code, *here(), rounds, *values)


def _means(seconds: Sequence[float], period: int) -> list[float]:
    """Per step, over each round of `period` steps."""
    return [statistics.fmean(seconds[i : i + period]) for i in range(0, len(seconds), period)]


def _quartiles(values: Sequence[float], unit: float = 1) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return unit * middle, unit * low, unit * high
