"""The contents of the files of results, by cell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import numpy as np

from memaop_triton.bench.studies.quality import tables
from memaop_triton.bench.studies.quality.calibration import StepNoise
from memaop_triton.bench.studies.quality.crossterms import CrossTerms
from memaop_triton.bench.studies.quality.decided import Decided
from memaop_triton.bench.studies.quality.noise import Noise
from memaop_triton.bench.studies.quality.schemes import (
    AUTO,
    DENSE,
    DENSE_SHARES,
    SHORTER,
    WHOLE,
    Cell,
    value_of,
)
from memaop_triton.bench.studies.quality.statistics import Difference, paired
from memaop_triton.bench.studies.quality.step_times import StepTime
from memaop_triton.bench.studies.quality.store import CurvePoint, Run, Store
from memaop_triton.bench.studies.quality.tasks import TASKS
from memaop_triton.bench.studies.quality.tuning import Trial

# That a run of dense may take longer than the one it is compared with.
_A_LITTLE = 1.02


@dataclass(frozen=True)
class Results:
    """All there is in a folder.

    Attributes:
        runs: By cell and seed; those of another code are left out.
        curves: By cell and seed.
        times: By cell, of one machine and number of threads.
        machine: Which, in words; empty without times.
        trials: Of learning rates.
        cross_terms: Of the experiment on frozen weights.
        noise: Of single steps.
        calibration: Noise all along runs of dense.
        decided: Times of runs in which the library decides, by task and seed.
        stale: Runs that were left out.
    """

    runs: dict[Cell, dict[int, Run]]
    curves: dict[Cell, dict[int, list[CurvePoint]]]
    times: dict[Cell, StepTime]
    machine: str
    trials: list[Trial]
    cross_terms: list[CrossTerms]
    noise: list[Noise]
    calibration: list[StepNoise]
    decided: dict[str, dict[int, Decided]]
    stale: int

    def metrics(self, cell: Cell) -> dict[int, float]:
        """What counts in the cell's task, by seed; without the runs that diverged."""
        runs = self.runs.get(cell, {})
        return {seed: run.metric for seed, run in runs.items() if not run.diverged_at}

    def diverged(self, cell: Cell) -> int:
        """Runs of a cell that diverged."""
        return sum(run.diverged_at > 0 for run in self.runs.get(cell, {}).values())

    def difference(self, cell: Cell) -> Difference | None:
        """To dense, `None` if there is no pair of runs or a run of the cell diverged."""
        if self.diverged(cell):
            return None
        return paired(self.metrics(cell), self.metrics(cell.dense), TASKS[cell.task].sign)

    def at_equal_time(self, cell: Cell, kind: str = SHORTER) -> Difference | None:
        """To dense that takes as many seconds as the cell's runs, by fewer steps or fewer rows.

        Runs of dense are interpolated linearly. `None` without runs or step times, and where the
        cell takes longer than dense or less time than the cheapest of these.
        """
        if self.diverged(cell) or cell not in self.times or cell.scheme == kind:
            return None
        dense = self._dense_within(self.times[cell].share, cell.task, kind)
        return paired(self.metrics(cell), dense, TASKS[cell.task].sign)

    def auto_at_equal_time(self, task: str, kind: str) -> Difference | None:
        """Of the runs in which the library decides to dense in the same seconds, each run's own.

        Beyond dense's own time it goes on in a straight line. The shortest runs of dense may take a
        little longer than auto, and count as they are, which is in favour of dense.
        """
        auto, dense = self.metrics(Cell(task, AUTO, WHOLE)), {}
        for seed, line in self.decided[task].items():
            points = self._dense_points(task, kind).get(seed, [])
            if len(points) > 1 and points[0][0] <= _A_LITTLE * line.share:
                dense[seed] = _interpolated(max(line.share, points[0][0]), points)
        return paired(auto, dense, TASKS[task].sign)

    def _dense_within(self, share: float, task: str, kind: str) -> dict[int, float]:
        """By seed, what dense reaches in a share of its time."""
        return {
            seed: _interpolated(share, points)
            for seed, points in self._dense_points(task, kind).items()
            if points[0][0] <= share <= 1
        }

    def _dense_points(self, task: str, kind: str) -> dict[int, list[tuple[float, float]]]:
        """By seed, shares of dense's time, from the least to all, and what dense reaches then."""
        by_share = {1.0: self.metrics(Cell(task, DENSE, WHOLE))}
        for one in DENSE_SHARES[kind]:
            cell = Cell(task, kind, one)
            if kind == SHORTER:
                by_share[value_of(one)] = self.metrics(cell)
            elif cell in self.times:
                by_share[self.times[cell].share] = self.metrics(cell)
        return {
            seed: sorted((at, ends[seed]) for at, ends in by_share.items() if seed in ends)
            for seed in by_share[1.0]
        }

    def any_run(self, cell: Cell) -> Run | None:
        """One of a cell's runs, for what is the same in all of them."""
        return next(iter(self.runs.get(cell, {}).values()), None)

    def step_ms(self, cell: Cell) -> float | None:
        """Median milliseconds of a step; dense's is the median of its medians beside others."""
        if cell.has_own_steps:
            return self.times[cell].ms if cell in self.times else None
        dense = [one.dense for one in self.times.values() if one.task == cell.task]
        return median(dense) if dense else None

    def mean_curve(self, cell: Cell) -> list[tuple[int, float]]:
        """(step, metric) as far as all seeds of the cell have come."""
        curves = list(self.curves.get(cell, {}).values())
        return [
            (points[0].step, fmean(getattr(point, TASKS[cell.task].metric) for point in points))
            for points in zip(*curves, strict=False)
        ]


def _interpolated(share: float, points: Sequence[tuple[float, float]]) -> float:
    """Linearly between points in order, and beyond the last one like before it."""
    shares, values = zip(*points, strict=True)
    if share <= shares[-1]:
        return float(np.interp(share, shares, values))
    slope = (values[-1] - values[-2]) / (shares[-1] - shares[-2])
    return float(values[-1] + slope * (share - shares[-1]))


def load(folder: Path) -> Results:
    """Read what is there of the files of results.

    Raises:
        TableError: One of them is not what it should be.
    """
    store = Store(folder)
    runs: dict[Cell, dict[int, Run]] = defaultdict(dict)
    for run in store.runs():
        runs[run.cell][run.seed] = run
    times = [
        one for one in tables.read(folder / "seconds.csv", StepTime) if one.cell.has_code(one.code)
    ]
    machines = [(one.cpu, one.threads) for one in times]
    decided: dict[str, dict[int, Decided]] = defaultdict(dict)
    for line in tables.read(folder / "decided.csv", Decided):
        if line.scheme == AUTO and Cell(line.task, AUTO, WHOLE).has_code(line.code):
            decided[line.task][line.seed] = line
    most = max(machines, key=machines.count, default=None)
    return Results(
        dict(runs),
        store.curves(),
        {one.cell: one for one in times if (one.cpu, one.threads) == most},
        "" if most is None else f"{most[0]}, {most[1]} threads",
        tables.read(folder / "tuning.csv", Trial),
        tables.read(folder / "crossterms.csv", CrossTerms),
        tables.read(folder / "noise.csv", Noise),
        tables.read(folder / "calibration.csv", StepNoise),
        dict(decided),
        store.stale(),
    )
