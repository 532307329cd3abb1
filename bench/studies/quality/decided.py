"""Runs in which the library decides, `ratio="auto"`, and what they take beside dense.

Decisions hang on times, so nothing else may run on the machine. Dense steps are timed in bursts at
the points of the curve, all along the run, so that a drift of the machine's speed changes both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import nn

from memaop_triton.auto.controller import Controller
from memaop_triton.bench.machine import here
from memaop_triton.bench.studies.quality import data, tables
from memaop_triton.bench.studies.quality.batches import Batch
from memaop_triton.bench.studies.quality.flops import UNKNOWN
from memaop_triton.bench.studies.quality.running import Job, keep
from memaop_triton.bench.studies.quality.schemes import WHOLE, Cell
from memaop_triton.bench.studies.quality.store import Run, Store
from memaop_triton.bench.studies.quality.training import Trainer, curve_points, train
from memaop_triton.nn.layer_choice import converted_layers

# Of a burst. Its first steps find other data in the caches and are not counted.
_SECONDS, _STEPS, _WARM_UP = 0.2, 4, 1


class Decided(NamedTuple):
    """A line of `decided.csv`.

    Attributes:
        task: Its name.
        scheme: Of those that decide.
        seed: Of the run.
        code: Of task and configuration.
        cpu: Its name and vector instructions.
        threads: Of PyTorch.
        steps: Of the run.
        sampled: Of these, how many had a layer that sampled.
        first: The first of those, 0 if there is none.
        dense: Milliseconds of a dense step, the mean over the bursts.
        ms: Of a step of the run, the mean over all, decisions included.
        share: The second over the first.
        predicted: Progress per second over dense's by the last choice; 1 if it is all exact.
        realised: The same by the last trial; 0 if there was none.
        summary: What was decided at the end, in words.
    """

    task: str
    scheme: str
    seed: int
    code: str
    cpu: str
    threads: int
    steps: int
    sampled: int
    first: int
    dense: float
    ms: float
    share: float
    predicted: float
    realised: float
    summary: str


def do(
    job: Job, store: Store, data_dir: Path | None, progress: Callable[[int], None] = lambda _: None
) -> tuple[Run, Decided]:
    """Train, and keep the result and its times."""
    cell, seed = job
    task = cell.problem.located(data_dir)
    source = data.load(task, data_dir)
    trainer = cell.trainer(task, seed)
    dense = _Dense(Trainer(task, None, seed), source.batches(task.batch, 1 << 30, _generator()))
    controller = controller_of(trainer.model)
    points, sampled = curve_points(task), list[int]()

    def stepped(number: int) -> None:
        if number in points:
            dense.burst()
        if _is_sampling(trainer.model):
            sampled.append(number + 1)
        progress(number)

    outcome = train(trainer, source, stepped)
    run = keep(job, UNKNOWN, outcome, store)
    ms, beside = 1e3 * fmean(outcome.step_seconds), 1e3 * fmean(dense.seconds)
    sampled = [number for number in sampled if number <= len(outcome.step_seconds)]
    line = Decided(
        cell.task,
        cell.scheme,
        seed,
        cell.code,
        *here(),
        len(outcome.step_seconds),
        len(sampled),
        min(sampled, default=0),
        beside,
        ms,
        ms / beside,
        controller.predicted.progress if controller.predicted is not None else 1.0,
        controller.realised or 0.0,
        controller.summary(),
    )
    tables.update(path_in(store), Decided, [line], _key)
    return run, line


def path_in(store: Store) -> Path:
    """The file of the lines."""
    return store.folder / "decided.csv"


def _key(line: Decided) -> tuple[object, ...]:
    return (*Cell(line.task, line.scheme, WHOLE).place, line.seed)


def controller_of(model: nn.Module) -> Controller:
    """Of a model that was converted with `ratio="auto"`."""
    found = {layer.layer_state.controller for _, layer in converted_layers(model)}
    (controller,) = found
    assert isinstance(controller, Controller)
    return controller


def _is_sampling(model: nn.Module) -> bool:
    """Whether a layer samples its rows in the step to come."""
    return any(layer.config.ratio != 1 for _, layer in converted_layers(model))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class _Dense:
    """Steps of a dense network, in bursts."""

    def __init__(self, trainer: Trainer, batches: Iterator[Batch]) -> None:
        self._trainer = trainer
        self._batches = batches
        self.seconds: list[float] = []

    def burst(self) -> None:
        """Take some."""
        taken: list[float] = []
        while len(taken) < _STEPS + _WARM_UP or sum(taken) < _SECONDS:
            self._trainer.step(next(self._batches))
            taken.append(self._trainer.seconds[-1])
        self.seconds += taken[_WARM_UP:]
