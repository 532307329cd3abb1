"""How noisy the steps of a run are, all along it: what `progress` predicts its progress from.

Dense is trained from a seed. At the points of its curve, and at some early steps, rows of all
layers are captured from a few batches, with the weights as they are. D = Σ ‖dW‖² is a mean over
these batches, and so is V, the variance that a scheme's rows would add: with the rows, the side and
the rank that its budget has room for, and for a scheme that spreads a budget over the layers the
shares that add least. Bases of subspaces come from one more batch.

Covered are schemes without bias and with an exact dX. The noise of a sampled dX goes through all
layers below, and what a projection or a memory of rows leaves is no variance.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from memaop_triton.bench.studies.quality import data, tables
from memaop_triton.bench.studies.quality.batches import Batch
from memaop_triton.bench.studies.quality.capture import Rows, hidden_layers, rows_of
from memaop_triton.bench.studies.quality.noise import sizes_of
from memaop_triton.bench.studies.quality.schemes import Cell
from memaop_triton.bench.studies.quality.tasks import Task
from memaop_triton.bench.studies.quality.training import (
    Seeds,
    Trainer,
    curve_points,
    evaluating,
)
from memaop_triton.bench.studies.quality.variances import (
    BY_INCLUSION,
    NO_SUBSPACE,
    Captured,
    Sampled,
    all_ranks,
    sampled,
    scores_of,
)
from memaop_triton.monitor.estimates import batch_variance

EARLY = (5, 15, 30)  # steps
BATCHES = 3  # that V and D are means over


class StepNoise(NamedTuple):
    """A line of `calibration.csv`: one layer under a scheme after some steps of dense.

    Attributes:
        task: Whose network.
        scheme: Its name.
        ratio: As in `"1/8"`.
        seed: Of dense.
        code: Of the task and the scheme's configuration.
        step: Steps that dense was trained for.
        layer: Its name.
        side: "input" or "grad", of the subspace, if there is one.
        rank: Of the subspace; 0 if there is none.
        k: Rows that are drawn.
        variance: V of the layer, E‖dW_sampled − dW‖².
        square: D of the layer, ‖dW‖².
        own: Variance of dW from batch to batch, if rows were independent.
        others: ‖gradient‖² of all Parameters that no scheme samples, the same in all layers.
    """

    task: str
    scheme: str
    ratio: str
    seed: int
    code: str
    step: int
    layer: str
    side: str
    rank: int
    k: int
    variance: float
    square: float
    own: float
    others: float

    @property
    def cell(self) -> Cell:
        """The scheme it is of."""
        return Cell(*self[:3])


def is_covered(cell: Cell) -> bool:
    """Whether all that a cell does to gradients is variance of dW."""
    config = cell.config
    if config is None or config.grad_input_name != "exact" or config.row_memory is not None:
        return False
    return config.selection in (*BY_INCLUSION, "uniform", "crs")


def steps_of(task: Task) -> list[int]:
    """The steps after which noise is measured."""
    points = curve_points(task)
    return sorted({step for step in EARLY if step < points[0]} | set(points))


def run(cells: Collection[Cell], seed: int, path: Path, data_dir: Path | None) -> Iterator[str]:
    """Measure what the file at `path` does not hold yet, and write it there step by step.

    Args:
        cells: Covered ones of one task.
        seed: Of dense.
        path: Of `calibration.csv`.
        data_dir: Where the data is.

    Yields:
        ν of every cell after a step that has been measured, in words.
    """
    wanted = _missing(cells, seed, tables.read(path, StepNoise))
    if not wanted:
        return
    task = next(iter(cells)).dense.problem.located(data_dir)
    source = data.load(task, data_dir)
    trainer, seeds = Trainer(task, None, seed), Seeds.of(seed)
    batches = source.batches(task.batch, max(wanted), torch.Generator().manual_seed(seeds.batches))
    for step, batch in enumerate(batches, start=1):
        trainer.step(batch)
        if step in wanted:
            # Of its own seed, so that a run that was stopped goes on with the same figures.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seeds.draws + step)
                generator = torch.Generator().manual_seed(seeds.draws + step)
                few = list(source.batches(task.batch, 1 + BATCHES, generator))
                captured, others = measure(trainer, few, all_ranks(wanted[step]))
            lines = [
                _line(cell, seed, step, name, captured[name], one, others)
                for cell in wanted[step]
                for name, one in sampled(cell, step, captured).items()
            ]
            tables.update(path, StepNoise, lines, _key)
            yield _summary(step, lines)


def _missing(cells: Iterable[Cell], seed: int, lines: Iterable[StepNoise]) -> dict[int, list[Cell]]:
    """Cells by step whose noise is not known yet."""
    known = {(one.cell, one.code, one.seed, one.step) for one in lines}
    found: dict[int, list[Cell]] = defaultdict(list)
    for cell in cells:
        for step in steps_of(cell.problem):
            if (cell, cell.code, seed, step) not in known:
                found[step].append(cell)
    return found


def measure(
    trainer: Trainer, batches: Sequence[Batch], ranks: Callable[[int, int, int], set[int]]
) -> tuple[dict[str, Captured], float]:
    """All hidden layers by name, and `StepNoise.others`.

    Args:
        trainer: Dense. Its weights and moments stay as they are, its gradients do not.
        batches: The first is for bases, the others are measured.
        ranks: From M, N and P of a layer to the ranks of its subspaces, 0 if there are none.
    """
    model, task = trainer.model, trainer.task
    layers = hidden_layers(model, task)
    rows: dict[str, list[Rows]] = defaultdict(list)
    squares: dict[str, list[float]] = defaultdict(list)
    others = []
    with evaluating(model):
        for batch in batches:
            model.zero_grad()
            for name, (one,) in rows_of(model, task, [batch]).items():
                rows[name].append(one)
            for name, layer in layers.items():
                squares[name].append(_square(layer.weight))
            whole = sum(map(_square, model.parameters()))
            others.append(whole - sum(of_layer[-1] for of_layer in squares.values()))
    captured = {}
    for name, (before, *after) in rows.items():
        sizes = sizes_of(before)
        scores = scores_of(before, after, sorted({0} | ranks(*sizes)))
        own = [
            float(
                batch_variance(one[NO_SUBSPACE].double().square().sum(), torch.tensor(d), sizes[0])
            )
            for one, d in zip(scores, squares[name][1:], strict=True)
        ]
        captured[name] = Captured(sizes, scores, squares[name][1:], fmean(own))
    return captured, fmean(others[1:])


def _square(parameter: Tensor) -> float:
    assert parameter.grad is not None
    return float(parameter.grad.double().square().sum())


def _line(
    cell: Cell, seed: int, step: int, name: str, layer: Captured, one: Sampled, others: float
) -> StepNoise:
    figures = one.variance, fmean(layer.squares), layer.own, others
    return StepNoise(*cell, seed, cell.code, step, name, *one.choice, one.k, *figures)


def _summary(step: int, lines: Sequence[StepNoise]) -> str:
    """ν of every cell in a line of `lines`."""
    by_cell: dict[Cell, list[StepNoise]] = defaultdict(list)
    for line in lines:
        by_cell[line.cell].append(line)
    shown = (f"{cell.scheme} {cell.ratio} {noise_of(mine):.3f}" for cell, mine in by_cell.items())
    return f"step {step}: {', '.join(shown)}"


def noise_of(lines: Sequence[StepNoise], *, with_others: bool = True) -> float:
    """ν = V/D of the layers of one step, `others` in D or not."""
    square = sum(line.square for line in lines) + (lines[0].others if with_others else 0.0)
    return sum(line.variance for line in lines) / square


def _key(line: StepNoise) -> tuple[object, ...]:
    return (*line.cell.place, line.seed, line.step, line.layer)
