"""What a sampled step is worth: progress predicted from its noise, beside measured progress.

Measured progress of a run is the share of dense's steps after which dense has the same loss. At the
end of a run it is interpolated between whole dense runs of fewer steps, whose learning rates have
come down as well; in between by dense's own curve, whose rate has not.

Predicted progress is the mean over a run's steps of a function of their noise ν = V/D.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

import numpy as np

from memaop_triton.auto.worth import progress_of
from memaop_triton.bench.studies.quality.calibration import StepNoise
from memaop_triton.bench.studies.quality.results import Results
from memaop_triton.bench.studies.quality.schemes import DENSE_SHARES, SHORTER, Cell, value_of
from memaop_triton.bench.studies.quality.tasks import TASKS

#: How far a prediction may be off.
TOLERANCE = 0.1
#: The noise up to which it should not be further off.
MOST_NOISE = 0.5
_FACTORS = np.geomspace(0.05, 20, 241)  # of ν, among which the best one is looked for
Layers = Sequence[StepNoise]  # of one step


@dataclass(frozen=True)
class Pair:
    """Runs of a scheme beside those of dense.

    Attributes:
        cell: The scheme's.
        seeds: How many runs of it have one of dense.
        measured: Mean progress at the end.
        error: Standard error of that mean, by the scatter between the seeds of all cells of the
            task; NaN if no cell has two. That of the dense curve is not in it.
        steps: Where noise was measured.
        layers: The noise there.
    """

    cell: Cell
    seeds: int
    measured: float
    error: float
    steps: tuple[int, ...]
    layers: tuple[Layers, ...]

    @property
    def is_decided(self) -> bool:
        """Whether the measured progress is known better than predictions have to be."""
        return 2 * self.error <= TOLERANCE


def total(layers: Layers) -> float:
    """V/D, both summed over the sampled layers."""
    return _ratio(layers, [one.variance for one in layers])


def total_of_all(layers: Layers) -> float:
    """V over the D of all Parameters, sampled or not."""
    square = sum(one.square for one in layers) + layers[0].others
    return sum(one.variance for one in layers) / square


def capped(layers: Layers) -> float:
    """Σ min(V, D) / Σ D over the sampled layers: none has a noise of its own above 1."""
    return _ratio(layers, [min(one.variance, one.square) for one in layers])


def mean_of_layers(layers: Layers) -> float:
    """The mean over the sampled layers of min(1, V/D)."""
    return fmean(min(1.0, one.variance / one.square) for one in layers)


def _ratio(layers: Layers, variances: Iterable[float]) -> float:
    return sum(variances) / sum(one.square for one in layers)


def at_dense_rate(noise: float) -> float:
    """1 − ν, at least 0: an SGD step at the rate that is best for dense."""
    return max(0.0, 1 - noise)


def at_retuned_rate(noise: float) -> float:
    """1/(1 + ν): the same at the rate that is best for the noise; what `ratio="auto"` goes by."""
    return progress_of(noise)


def with_adam(noise: float) -> float:
    """2/√(1 + ν) − 1, at least 0: Adam, whose second moment has the noise in it."""
    return max(0.0, 2 / math.sqrt(1 + noise) - 1)


@dataclass(frozen=True)
class Formula:
    """From the layers of a step to its progress.

    Attributes:
        noise: To ν.
        progress: From ν.
        power: Of the learning rate, that weights the mean over steps.
        early: The only step that counts, or the next one that was measured, or the last; `None`
            for all.
    """

    noise: Callable[[Layers], float] = capped
    progress: Callable[[float], float] = at_retuned_rate
    power: int = 0
    early: int | None = None

    def predict(self, pair: Pair, factor: float = 1.0, until: int | None = None) -> float:
        """Mean progress of a pair's steps, ν divided by a factor.

        Between steps that were measured it is interpolated; before the first it is as there.

        Args:
            pair: Whose noise.
            factor: c, in place of ν stands ν/c.
            until: Steps from the start, all if `None`.
        """
        values = [self.progress(self.noise(layers) / factor) for layers in pair.layers]
        if self.early is not None:
            later = (
                one for step, one in zip(pair.steps, values, strict=True) if step >= self.early
            )
            return next(later, values[-1])
        task = TASKS[pair.cell.task]
        every = np.arange(until or task.steps)
        course = np.interp(every, pair.steps, values)
        rates = [task.optimizer.factor(int(step), task.steps) ** self.power for step in every]
        return float(np.average(course, weights=rates))


#: The one that predicts best, without a fitted factor: the ν of a step says what it is worth.
BEST = Formula()


def pairs(results: Results, lines: Iterable[StepNoise]) -> list[Pair]:
    """All cells whose noise and whose progress are known, in the order of the tables."""
    by_cell: dict[Cell, dict[int, list[StepNoise]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if line.cell.has_code(line.code):
            by_cell[line.cell][line.step].append(line)
    measured = {cell: progress_at_end(results, cell) for cell in by_cell}
    scatter: dict[str, list[float]] = defaultdict(list)
    for cell, values in measured.items():
        if len(values) > 1:
            scatter[cell.task].append(variance(values))
    found = []
    for cell in sorted(by_cell, key=lambda one: one.place):
        values = measured[cell]
        if values:
            known = scatter[cell.task]
            error = math.sqrt(fmean(known) / len(values)) if known else math.nan
            steps = tuple(sorted(by_cell[cell]))
            layers = tuple(by_cell[cell][step] for step in steps)
            found.append(Pair(cell, len(values), fmean(values), error, steps, layers))
    return found


def progress_at_end(results: Results, cell: Cell) -> list[float]:
    """The share of dense's steps that reaches a run's final loss, by seed; none if not known.

    Dense's mean losses after several shares of the steps are joined by straight lines, the last of
    which goes on beyond the whole run. A run's place is dense's last one plus its difference to
    dense of the same seed. Runs whose mean is worse than the shortest run of dense have none.
    """
    whole, mine = _losses(results, cell.dense), _losses(results, cell)
    shorter = {
        value_of(share): losses
        for share in DENSE_SHARES[SHORTER]
        if (losses := _losses(results, Cell(cell.task, SHORTER, share)))
    }
    if not shorter:
        return []
    # As a difference to the whole run of the same seed, so that other seeds do not count.
    curve = [(1.0, 0.0)]
    for share in sorted(shorter, reverse=True):
        both = shorter[share].keys() & whole.keys()
        if both:
            curve.append((share, fmean(shorter[share][seed] - whole[seed] for seed in both)))
    found = [_share_at(mine[seed] - whole[seed], curve) for seed in sorted(mine.keys() & whole)]
    return found if found and fmean(found) >= curve[-1][0] else []


def _losses(results: Results, cell: Cell) -> dict[int, float]:
    runs = results.runs.get(cell, {})
    return {seed: run.loss for seed, run in runs.items() if not run.diverged_at}


def _share_at(loss: float, curve: Sequence[tuple[float, float]]) -> float:
    """Where a falling curve of (share, loss), from its end on, has a loss."""
    at = 1
    while at < len(curve) - 1 and loss > curve[at][1]:
        at += 1
    (later, low), (earlier, high) = curve[at - 1], curve[at]
    return later + (earlier - later) * (loss - low) / (high - low)


def progress_along(results: Results, pair: Pair) -> list[tuple[int, float]]:
    """(step, progress until then) at the points of a run's curve, means over seeds.

    It is the share of these steps after which dense's curve of the same seed came to the same loss,
    if it did between two of its points.
    """
    found: dict[int, list[float]] = defaultdict(list)
    dense = results.curves.get(pair.cell.dense, {})
    for seed, points in results.curves.get(pair.cell, {}).items():
        curve = [(one.step, one.loss) for one in dense.get(seed, [])]
        for point in points:
            for (before, high), (after, low) in itertools.pairwise(curve):
                if low <= point.loss <= high and high > low:
                    step = before + (after - before) * (high - point.loss) / (high - low)
                    found[point.step].append(step / point.step)
                    break
    return [(step, fmean(values)) for step, values in sorted(found.items())]


@dataclass(frozen=True)
class Fit:
    """How well a formula predicts.

    Attributes:
        factor: That ν is divided by.
        by_task: The same, fitted to all other tasks; all are `factor` where it was not fitted.
        misses: Predicted less measured of every pair, with the factor of the others.
    """

    factor: float
    by_task: dict[str, float]
    misses: list[float]

    @property
    def rms(self) -> float:
        """Root mean square of the misses."""
        return math.sqrt(fmean(miss * miss for miss in self.misses))

    @property
    def within(self) -> float:
        """Share of the pairs whose miss is within the tolerance."""
        return fmean(abs(miss) <= TOLERANCE for miss in self.misses)


def without_fit(formula: Formula, known: Sequence[Pair], factor: float = 1.0) -> Fit:
    """A formula with a factor that does not depend on the pairs."""
    misses = [formula.predict(pair, factor) - pair.measured for pair in known]
    return Fit(factor, {pair.cell.task: factor for pair in known}, misses)


def leave_one_out(formula: Formula, known: Sequence[Pair]) -> Fit:
    """Factors of least squares, all tasks alike, each task's misses by a fit to the others."""
    table = np.array([[formula.predict(pair, factor) for pair in known] for factor in _FACTORS])
    misses = table - [pair.measured for pair in known]
    of_tasks = np.array([pair.cell.task for pair in known])

    def best(tasks: Collection[str]) -> int:
        squares = sum(np.square(misses[:, of_tasks == task]).mean(1) for task in tasks)
        return int(np.argmin(squares))

    tasks = dict.fromkeys(of_tasks.tolist())
    chosen = {task: best(tasks.keys() - {task}) for task in tasks}
    mine = [float(misses[chosen[task], at]) for at, task in enumerate(of_tasks.tolist())]
    by_task = {task: float(_FACTORS[at]) for task, at in chosen.items()}
    return Fit(float(_FACTORS[best(tasks)]), by_task, mine)
