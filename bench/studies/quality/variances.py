"""The variance that a configuration adds to weight gradients, from rows that were captured.

Side and rank of a subspace, and the shares of layers that `allocate_` serves, are those of least
(Σs)²/K − Σs², cut at 0, by which the library chose when the runs of the study were made. What they
leave is Σ s²(1/p − 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from torch import Tensor

from memaop_triton import MemAOPConfig
from memaop_triton.bench.studies.quality.capture import Rows
from memaop_triton.bench.studies.quality.noise import basis_of, variance_of
from memaop_triton.bench.studies.quality.schemes import Cell
from memaop_triton.bench.studies.quality.training import ALLOCATE_EVERY, ALLOCATED_SHARES
from memaop_triton.dispatch import row_norms
from memaop_triton.flops import RANK_STEP, SubspaceCost, weight_grad_flops
from memaop_triton.memory.choice import Choice
from memaop_triton.monitor.allocate import best_options
from memaop_triton.monitor.hull import Option

NO_SUBSPACE = Choice("input", 0)
#: Policies whose variance is Σ s²(1/p − 1); those of others follow from their draws.
BY_INCLUSION = ("priority", "bernoulli")


class Captured(NamedTuple):
    """A layer's rows, as far as variances need them.

    Attributes:
        sizes: M, N and P.
        scores: For every batch, by side and rank, what is left of the rows' scores: [M].
        squares: ‖dW‖² of every batch.
        own: Variance of dW from batch to batch, a mean over the batches.
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
        assumed: The same by the shorter formula, which the choice was made by.
    """

    choice: Choice
    k: int
    flops: int
    variance: float
    assumed: float


def scores_of(before: Rows, after: Sequence[Rows], ranks: list[int]) -> list[dict[Choice, Tensor]]:
    """What subspaces of either side leave of the scores of rows.

    Args:
        before: Of one batch, which bases come from.
        after: Of the others.
        ranks: In ascending order, from 0 on.

    Returns:
        For every one of the others, by side and rank: [M].
    """
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
    """The side and the rank that a configuration would choose, and what they leave."""
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


def all_ranks(cells: Iterable[Cell]) -> Callable[[int, int, int], set[int]]:
    """The ranks that any of the cells may choose."""
    configs: list[MemAOPConfig] = []
    for cell in cells:
        config = cell.config
        assert config is not None
        shares = [] if cell.allocated is None else _shares_of(config)
        configs += [config, *(_with_share(config, share) for share in shares)]
    return lambda m, n, p: {rank for config in configs for rank in _ranks(config, m, n, p)}
