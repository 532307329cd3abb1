"""Learning rates of the dense network, judged on a part of the training data."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from memaop_triton.bench.studies.quality import data, tables
from memaop_triton.bench.studies.quality.schemes import LONG_TASKS, code_of
from memaop_triton.bench.studies.quality.tasks import Task
from memaop_triton.bench.studies.quality.training import Trainer, train

# A run of the long tasks takes a quarter of an hour.
FACTORS, SEEDS = (1 / 4, 1 / 2, 1, 2, 4), 2
FEW_FACTORS, FEW_SEEDS = (1 / 2, 1, 2), 1


class Trial(NamedTuple):
    """A line of `tuning.csv`: dense, judged on training data that it was not trained on.

    Attributes:
        task: Its name.
        lr: The highest learning rate of the run.
        seed: Of the run.
        code: Of the task with this learning rate.
        loss: In nats.
        accuracy: In %.
    """

    task: str
    lr: float
    seed: int
    code: str
    loss: float
    accuracy: float


def candidates(task: Task) -> list[Task]:
    """The task at learning rates around its own."""
    factors = FEW_FACTORS if task.name in LONG_TASKS else FACTORS
    return [with_rate(task, float(f"{factor * task.optimizer.lr:.3g}")) for factor in factors]


def with_rate(task: Task, lr: float) -> Task:
    """The task at another learning rate."""
    return dataclasses.replace(task, optimizer=dataclasses.replace(task.optimizer, lr=lr))


def tune(task: Task, path: Path, data_dir: Path | None) -> Iterator[Trial]:
    """Try the learning rates that `path` does not hold yet, and write them there."""
    task = task.located(data_dir)
    source = data.load(task, data_dir).for_tuning()
    known = {(one.code, one.seed) for one in tables.read(path, Trial)}
    for candidate in candidates(task):
        code = code_of(candidate, None)
        for seed in range(FEW_SEEDS if task.name in LONG_TASKS else SEEDS):
            if (code, seed) not in known:
                score = train(Trainer(candidate, None, seed), source).score
                trial = Trial(task.name, candidate.optimizer.lr, seed, code, *score)
                # A trial of another code stays: its column `code` identifies it.
                tables.update(path, Trial, [trial], lambda one: one[:4])
                yield trial


def best_rate(task: Task, trials: Iterable[Trial]) -> float | None:
    """The learning rate with the best mean, of those at which no run diverged; `None` of none."""
    results: dict[float, list[float]] = {}
    for trial in trials:
        if trial.task == task.name and trial.code == code_of(with_rate(task, trial.lr), None):
            results.setdefault(trial.lr, []).append(task.sign * getattr(trial, task.metric))
    means = {lr: statistics.fmean(values) for lr, values in results.items()}
    finite = [lr for lr in means if math.isfinite(means[lr])]
    return max(finite, key=lambda lr: means[lr], default=None)
