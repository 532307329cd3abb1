"""Runs and their curves on disk: `runs.csv` and `curves.csv`.

The curve is written first and the run's line last, so a process that is killed loses the run it was
at and nothing else. Several processes may write.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

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
        return Cell(*self[:3])

    @property
    def is_current(self) -> bool:
        """Whether it is of the present task and configuration."""
        return self.cell.has_code(self.code)

    @property
    def metric(self) -> float:
        """The value that the task is judged by."""
        value: float = getattr(self, TASKS[self.task].metric)
        return value


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
        return [run for run in tables.read(self._runs, Run) if run.is_current]

    def stale(self) -> int:
        """How many others there are: their cells are run again."""
        return sum(not run.is_current for run in tables.read(self._runs, Run))

    def curves(self) -> dict[Cell, dict[int, list[CurvePoint]]]:
        """Points of every run of `runs`, in order. Points without a run do not count."""
        runs = self.runs()
        found: dict[Cell, dict[int, list[CurvePoint]]] = {run.cell: {} for run in runs}
        by_run: dict[tuple[object, ...], list[CurvePoint]] = {}
        for run in runs:
            by_run[run[:5]] = found[run.cell][run.seed] = []
        for point in tables.read(self._curves, CurvePoint):
            by_run.get(point[:5], []).append(point)
        return found

    def add(self, run: Run, outcome: Outcome) -> None:
        """Keep a run, in place of one with the same task, scheme, ratio and seed."""
        points = [CurvePoint(*run[:5], *point) for point in outcome.curve]
        tables.update(self._curves, CurvePoint, points, _key)
        tables.update(self._runs, Run, [run], _key)


def _key(row: Run | CurvePoint) -> tuple[object, ...]:
    """The same for the same task, scheme, ratio and seed, in the order of their tables."""
    return (*Cell(*row[:3]).place, row.seed)
