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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from memaop_triton import MemAOPConfig
from memaop_triton.bench.studies.quality import data, tables
from memaop_triton.bench.studies.quality.capture import Rows, hidden_layers, rows_of
from memaop_triton.bench.studies.quality.noise import basis_of, sizes_of, variance_of
from memaop_triton.bench.studies.quality.schemes import Cell
from memaop_triton.bench.studies.quality.tasks import Task
from memaop_triton.bench.studies.quality.training import (
    ALLOCATE_EVERY,
    ALLOCATED_SHARES,
    Seeds,
    Trainer,
    curve_points,
    evaluating,
)
from memaop_triton.dispatch import row_norms
from memaop_triton.flops import RANK_STEP, SubspaceCost, weight_grad_flops
from memaop_triton.memory.choice import Choice
from memaop_triton.monitor.allocate import Option, best_options
from memaop_triton.monitor.estimates import batch_variance

EARLY = (5, 15, 30)  # steps
BATCHES = 3  # that V and D are means over
_NONE = Choice("input", 0)
# Variances of Σ s²(1/p − 1); those of the others follow from their draws.
_BY_INCLUSION = ("priority", "bernoulli")


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


class Captured(NamedTuple):
    """A layer's rows, as far as variances need them.

    Attributes:
        sizes: M, N and P.
        scores: For every batch, by side and rank, what is left of the rows' scores: [M].
        squares: ‖dW‖² of every batch.
        own: Mean of `StepNoise.own`.
    """

    sizes: tuple[int, int, int]
    scores: list[dict[Choice, Tensor]]
    squares: list[float]
    own: float


class Sampled(NamedTuple):
    """What a configuration makes of a layer.

    Attributes:
        choice: Side and rank of the subspace.
        k: Rows beside it.
        flops: Of dW.
        variance: Mean over the batches.
        assumed: The same by the shorter formula, that choices were made by.
    """

    choice: Choice
    k: int
    flops: int
    variance: float
    assumed: float


def is_covered(cell: Cell) -> bool:
    """Whether all that a cell does to gradients is variance of dW."""
    config = cell.config
    if config is None or config.grad_input_name != "exact" or config.row_memory is not None:
        return False
    return config.selection in (*_BY_INCLUSION, "uniform", "crs")


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
                captured, others = measure(trainer, few, _ranks_of(wanted[step]))
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
    trainer: Trainer, batches: Sequence[data.Batch], ranks: Callable[[int, int, int], set[int]]
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
        scores = _scores(before, after, sorted({0} | ranks(*sizes)))
        own = [
            float(batch_variance(one[_NONE].double().square().sum(), torch.tensor(d), sizes[0]))
            for one, d in zip(scores, squares[name][1:], strict=True)
        ]
        captured[name] = Captured(sizes, scores, squares[name][1:], fmean(own))
    return captured, fmean(others[1:])


def _square(parameter: Tensor) -> float:
    assert parameter.grad is not None
    return float(parameter.grad.double().square().sum())


def _scores(before: Rows, after: Sequence[Rows], ranks: list[int]) -> list[dict[Choice, Tensor]]:
    found: list[dict[Choice, Tensor]] = [{} for _ in after]
    for side in ("input", "grad"):
        a, other = ("x", "g") if side == "input" else ("g", "x")
        basis = basis_of(getattr(before, a), ranks[-1]) if ranks[-1] else None
        for batch, scores in zip(after, found, strict=True):
            mine = getattr(batch, a)
            left = row_norms(mine)[None] if basis is None else basis.left_of(mine, ranks)
            products = left * row_norms(getattr(batch, other))
            scores |= {Choice(side, rank): one for rank, one in zip(ranks, products, strict=True)}
    return found


def sampled(cell: Cell, step: int, captured: Mapping[str, Captured]) -> dict[str, Sampled]:
    """What a cell's configuration makes of every layer after `step` steps."""
    config = cell.config
    assert config is not None
    if cell.allocated is None or step < ALLOCATE_EVERY:
        return {name: least(config, layer) for name, layer in captured.items()}
    found: dict[str, dict[float, Sampled]] = {}
    options: dict[str, list[Option]] = {}
    for name, layer in captured.items():
        found[name] = {
            share: least(_with_share(config, share), layer) for share in _shares_of(config)
        }
        mine = found[name].items()
        options[name] = [Option(share, one.flops, one.assumed) for share, one in mine]
    dense = sum(2 * m * n * p for m, n, p in (layer.sizes for layer in captured.values()))
    chosen = best_options(options, cell.allocated * dense)
    return {name: found[name][option.share] for name, option in chosen.items()}


def _shares_of(config: MemAOPConfig) -> list[float]:
    """What `allocate_` may give a layer."""
    return [share for share in ALLOCATED_SHARES if share < 1 or config.budget is None]


def _with_share(config: MemAOPConfig, share: float) -> MemAOPConfig:
    return config.spending(**{"ratio" if config.budget is None else "budget": share})


def least(config: MemAOPConfig, layer: Captured) -> Sampled:
    """The side and the rank, of those that a configuration may choose, that leave least."""
    m, n, p = layer.sizes
    ranks = _ranks(config, *layer.sizes)
    best: Sampled | None = None
    for choice in layer.scores[0]:
        if choice.rank not in ranks:
            continue
        length = n if choice.side == "input" else p
        cost = SubspaceCost(choice.rank, length, config.period, max(ranks) * (n + p))
        subspace = cost if choice.rank else None
        k = config.num_rows(m, n, p, subspace)
        variance = fmean(
            _variance(config.selection, scores[choice], k, square)
            for scores, square in zip(layer.scores, layer.squares, strict=True)
        )
        assumed = fmean(_assumed(scores[choice], k) for scores in layer.scores)
        if best is None or assumed < best.assumed:
            best = Sampled(choice, k, weight_grad_flops(m, n, p, k, subspace), variance, assumed)
    assert best is not None
    return best


def _assumed(scores: Tensor, k: int) -> float:
    """(Σs)²/K − Σs², at least 0."""
    s = scores.double()
    return max(0.0, float(s.sum() ** 2 / k - s.square().sum())) if k < len(s) else 0.0


def _variance(selection: str, scores: Tensor, k: int, square: float) -> float:
    """E‖T − dW‖² of drawing `k` rows with these scores; `square` is ‖dW‖²."""
    m = scores.numel()
    if k >= m:
        return 0.0
    if selection == "crs":  # a mean of K draws with p = s/Σs
        return (float(scores.double().sum()) ** 2 - square) / k
    if selection == "uniform":  # simple random sampling (Cochran 1977)
        return m * (m - k) / (k * (m - 1)) * (float(scores.double().square().sum()) - square / m)
    return variance_of(scores, k)


def _ranks(config: MemAOPConfig, m: int, n: int, p: int) -> set[int]:
    """Ranks that a configuration may choose in a layer, 0 if it has no subspace there."""
    if config.subspace is None:
        return {0}
    most = config.rank_for(m, n, p)
    return {most} if config.budget is None else {*range(0, most, RANK_STEP), most}


def _ranks_of(cells: Iterable[Cell]) -> Callable[[int, int, int], set[int]]:
    """The ranks that any of the cells may choose."""
    configs: list[MemAOPConfig] = []
    for cell in cells:
        config = cell.config
        assert config is not None
        shares = [] if cell.allocated is None else _shares_of(config)
        configs += [config, *(_with_share(config, share) for share in shares)]
    return lambda m, n, p: {rank for config in configs for rank in _ranks(config, m, n, p)}


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
