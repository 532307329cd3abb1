"""Runs and their curves on disk: `runs.csv` and `curves.csv`.

The curve is written first and the run's line last, each by replacing the file, so a process that is
killed loses the run it was at and nothing else. Several processes may write.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from memaop_triton.bench.studies.quality import tables
from memaop_triton.bench.studies.quality.schemes import Cell
from memaop_triton.bench.studies.quality.tasks import TASKS
from memaop_triton.bench.studies.quality.training import Outcome

RESULTS = Path(__file__).parents[2] / "results" / "quality"


class Run(NamedTuple):
    """A line of `runs.csv`.

    Attributes:
        task: Its name.
        scheme: Its name.
        ratio: As in `"1/8"`.
        seed: Of the run.
        code: Of the task and the configuration that gave it; another code is another experiment.
        loss: On all held-out data, in nats.
        accuracy: On all held-out data, in %.
        diverged_at: The step whose loss was not finite; 0 if there is none.
        weight_grads: FLOPs of all weight gradients, as a fraction of dense.
        backward: FLOPs of the backward pass of a step, in 10⁹.
        seconds: How long the run took, on a machine that may have done other things.
    """

    task: str
    scheme: str
    ratio: str
    seed: int
    code: str
    loss: float
    accuracy: float
    diverged_at: int
    weight_grads: float
    backward: float
    seconds: float

    @property
    def cell(self) -> Cell:
        """What it is a run of."""
        return Cell(self.task, self.scheme, self.ratio)

    @property
    def metric(self) -> float:
        """The value that the task is judged by."""
        return self.accuracy if TASKS[self.task].metric == "accuracy" else self.loss


class CurvePoint(NamedTuple):
    """A line of `curves.csv`: loss and accuracy on a sample of the held-out data."""

    task: str
    scheme: str
    ratio: str
    seed: int
    code: str
    step: int
    loss: float
    accuracy: float


Key = tuple[str, str, str, int]


class Store:
    """The results in a folder.

    Args:
        folder: It is made when the first run is added.
    """

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = folder
        self._runs, self._curves = folder / "runs.csv", folder / "curves.csv"

    def runs(self) -> list[Run]:
        """All runs whose task and configuration are still what they were."""
        return [run for run in self._all() if is_current(run)]

    def stale(self) -> list[Run]:
        """The others: their cells are run again."""
        return [run for run in self._all() if not is_current(run)]

    def curves(self) -> dict[Key, list[CurvePoint]]:
        """Points of every run of `runs`, in order. Points without a run do not count."""
        found: dict[Key, list[CurvePoint]] = {_key(run): [] for run in self.runs()}
        codes = {_key(run): run.code for run in self.runs()}
        for point in tables.read(self._curves, CurvePoint):
            if codes.get(_key(point)) == point.code:
                found[_key(point)].append(point)
        return found

    def add(self, run: Run, outcome: Outcome) -> None:
        """Keep a run, in place of one with the same task, scheme, ratio and seed."""
        key = _key(run)
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            points = [p for p in tables.read(self._curves, CurvePoint) if _key(p) != key]
            points += [CurvePoint(*key, run.code, *point) for point in outcome.curve]
            points.sort(key=lambda point: (*_order(point), point.step))
            tables.write(self._curves, CurvePoint, points)
            tables.update(self._runs, [run], _key, _order)

    def _all(self) -> list[Run]:
        return tables.read(self._runs, Run)


def is_current(run: Run) -> bool:
    """Whether a run is of what its names stand for now."""
    return run.cell.is_known and run.code == run.cell.code


def _key(row: Run | CurvePoint) -> Key:
    return row.task, row.scheme, row.ratio, row.seed


def _order(row: Run | CurvePoint) -> tuple[object, ...]:
    return (*Cell(row.task, row.scheme, row.ratio).place, row.seed)
