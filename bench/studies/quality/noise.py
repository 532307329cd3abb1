"""How noisy one sampled weight gradient is, layer by layer, and what a subspace takes away of it.

Rows of two batches are captured from a dense network. Bases come from the first; what they leave of
the second, and the rows that fit the same FLOPs beside them, give the variance of its weight
gradient, as a fraction of its squared norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from memaop_triton import MemAOPConfig
from memaop_triton.bench.studies.quality import data, tables
from memaop_triton.bench.studies.quality.capture import Rows, capture
from memaop_triton.bench.studies.quality.tasks import TASKS
from memaop_triton.dispatch import row_norms
from memaop_triton.flops import RANK_STEP, SubspaceCost
from memaop_triton.memory.basis import Basis
from memaop_triton.memory.choice import Choice
from memaop_triton.monitor.estimates import batch_variance
from memaop_triton.sampling.selection import inclusion_probabilities

NAMES = ("gpt-128", "mnist-adam")
STEPS = (50, 300)
_ITERATIONS = 8  # of a basis on its batch


class Noise(NamedTuple):
    """A line of `noise.csv`: the best that one side's subspace, or none, does within a budget.

    Attributes:
        task: Whose network.
        step: Steps it was trained for.
        layer: Its name.
        rows: M.
        inputs: N.
        outputs: P.
        budget: FLOPs of the weight gradient, as a fraction of dense.
        side: "none", "input" or "grad".
        rank: Of the subspace.
        k: Rows that are drawn beside it.
        variance: Of the weight gradient by the draws, over its squared norm.
        own: The same by the batch: what the dense gradient has itself.
    """

    task: str
    step: int
    layer: str
    rows: int
    inputs: int
    outputs: int
    budget: float
    side: str
    rank: int
    k: int
    variance: float
    own: float


def run(name: str, step: int, budget: float, path: Path, data_dir: Path | None) -> list[Noise]:
    """All hidden layers of a task, written into the file at `path` too."""
    task = TASKS[name]
    captured = capture(task, data.load(task, data_dir), step, batches=2)
    lines = []
    for layer, (before, after) in captured.items():
        m, n, p = sizes_of(after)
        for found in measure(before, after, budget):
            lines.append(Noise(name, step, layer, m, n, p, budget, *found))
    order = list(TASKS)
    tables.update(path, Noise, lines, lambda line: (order.index(line.task), line.step, line.budget))
    return lines


def sizes_of(rows: Rows) -> tuple[int, int, int]:
    """M, N and P."""
    return *rows.x.shape, rows.g.shape[1]


def measure(
    before: Rows, after: Rows, budget: float
) -> Iterator[tuple[str, int, int, float, float]]:
    """Side, rank, rows, variance and the batch's own, with no subspace first."""
    config = MemAOPConfig(budget=budget)
    sizes = sizes_of(after)
    square = (after.g.t() @ after.x).square().sum().double()
    products = row_norms(after.x).double() * row_norms(after.g).double()
    own = batch_variance(products.square().sum(), square, sizes[0]) / square
    most = max(config.rank_for(*sizes), min(RANK_STEP, *sizes))  # even where none is worth it
    ranks = [*range(0, most, RANK_STEP), most]
    found: dict[Choice, tuple[int, float]] = {}
    for side in ("input", "grad"):
        a, other = ("x", "g") if side == "input" else ("g", "x")
        left = basis_of(getattr(before, a), most).left_of(getattr(after, a), ranks)
        for rank, scores in zip(ranks, left * row_norms(getattr(after, other)), strict=True):
            length = sizes[1] if side == "input" else sizes[2]
            cost = SubspaceCost(rank, length, config.period, most * (sizes[1] + sizes[2]))
            k = config.num_rows(*sizes, cost if rank else None)
            found[Choice(side, rank)] = k, variance_of(scores, k) / float(square)
    none = found[Choice("input", 0)]
    yield "none", 0, *none, float(own)
    for side in ("input", "grad"):
        best = min((one for one in found if one.side == side), key=lambda one: found[one][1])
        yield side, best.rank, *found[best], float(own)


def variance_of(scores: torch.Tensor, k: int) -> float:
    """Of drawing rows with the best probabilities for K of them: Σ s² (1/p − 1)."""
    p = inclusion_probabilities(scores, k).double()
    return float((scores.double().square() * torch.where(p > 0, 1 / p - 1, 0)).sum())


def basis_of(rows: torch.Tensor, rank: int) -> Basis:
    """A basis after some power iterations on these rows ([M, features])."""
    basis = Basis(rows.shape[1], rank)
    for _ in range(_ITERATIONS):
        basis.follow(rows)
    return basis
