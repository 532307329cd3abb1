"""Why the paper's memory hurts deep networks: the sum of its weight gradients on frozen weights.

A slot of the row memory that was selected after a batches holds Σx and Σg, and gives the outer
product (Σg)(Σx)ᵀ: the a products g xᵀ that dense would have summed, and a(a−1) cross terms that
pair rows of different batches. With frozen weights all batches are draws of one distribution, so
the sum of what a method returns over T batches can be compared with the sum of dense gradients.

With `randk` the ages are known beforehand, and so is the inflation; see `predicted_ratio`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from memaop_triton import MemAOPConfig
from memaop_triton.backward.weight_grad import weight_grad
from memaop_triton.bench.studies.quality import data, tables, tasks
from memaop_triton.bench.studies.quality.capture import Rows, capture
from memaop_triton.bench.studies.quality.schemes import value_of
from memaop_triton.memory.kinds import ResidualMemory, new_memory

TASKS = ("mnist-adam", "gpt-128")
RATIOS = ("1/8", "1/32")
METHODS = tuple(
    (selection, memory)
    for memory in ("residual", "signed", "none")
    for selection in ("randk", "topk")
)
BATCHES = 64
DRAWS = 4
TRAINED = 100  # steps before the weights are frozen
_MOST_ROWS = 512


class CrossTerms(NamedTuple):
    """A line of `crossterms.csv`. D is the sum of dense gradients, S that of those returned.

    Attributes:
        task: Whose network.
        layer: Its name.
        selection: The policy.
        memory: The memory.
        ratio: K/M.
        draw: Which of several runs on the same batches that differ in what is drawn.
        batches: T.
        norm: ‖S‖/‖D‖.
        cosine: Between S and D.
        cross: ‖C‖/‖D‖ with C the cross terms of the slots selected so far; NaN without a memory.
        predicted: ‖S‖/‖D‖ by `predicted_ratio`; NaN but for `randk` with a memory.
    """

    task: str
    layer: str
    selection: str
    memory: str
    ratio: float
    draw: int
    batches: int
    norm: float
    cosine: float
    cross: float
    predicted: float


def run(task: str, ratio: str, path: Path, data_dir: Path | None) -> Iterator[str]:
    """All methods on all hidden layers of a task, written into the file at `path` at the end.

    Yields:
        The name of each layer that is done.
    """
    one, share = tasks.TASKS[task], value_of(ratio)
    captured = capture(one, data.load(one, data_dir), TRAINED, BATCHES, _MOST_ROWS)
    lines: list[CrossTerms] = []
    for layer, batches in captured.items():
        for selection, memory in METHODS:
            predicted = math.nan
            if selection == "randk" and memory != "none":
                predicted = predicted_ratio(batches, share, signed=memory == "signed")
            config = MemAOPConfig(ratio=share, selection=selection, memory=memory)
            draws_something = selection == "randk" or memory == "signed"
            for draw in range(DRAWS if draws_something else 1):
                method = (selection, memory, share, draw, BATCHES)
                measured = compare(batches, config, draw)
                lines.append(CrossTerms(task, layer, *method, *measured, predicted))
        yield layer
    tables.update(path, CrossTerms, lines, lambda line: (line.task, -line.ratio))


class Compared(NamedTuple):
    """S beside D, as in `CrossTerms`."""

    norm: float
    cosine: float
    cross: float


def compare(batches: Sequence[Rows], config: MemAOPConfig, draw: int = 0) -> Compared:
    """One method on all batches of one layer."""
    memory = new_memory(config, batches[0].x.shape[1], batches[0].g.shape[1])
    generator = torch.Generator().manual_seed(draw)
    emptied = torch.zeros(len(batches[0].x), dtype=torch.int64)  # by which batch, for every slot
    dense = torch.zeros(batches[0].g.shape[1], batches[0].x.shape[1], dtype=torch.float64)
    returned, held_back = torch.zeros_like(dense), torch.zeros_like(dense)
    for number, (x, g) in enumerate(batches, start=1):
        returned += weight_grad(x, g, config, memory, generator=generator)
        dense += (g.t() @ x).double()
        if isinstance(memory, ResidualMemory):
            assert memory.filled is not None
            emptied[~memory.filled] = number
    for number, (x, g) in enumerate(batches, start=1):
        held = emptied < number
        held_back += (g[held].t() @ x[held]).double()
    has_rows = isinstance(memory, ResidualMemory)
    size = dense.norm()
    return Compared(
        float(returned.norm() / size),
        float((returned * dense).sum() / (returned.norm() * size)),
        float((returned - (dense - held_back)).norm() / size) if has_rows else math.nan,
    )


def predicted_ratio(batches: Sequence[Rows], ratio: float, *, signed: bool) -> float:
    """‖S‖/‖D‖ that `randk` with a row memory should show after these batches.

    A slot is selected with probability r in each batch, so T batches end r(1−r)^(a−1)·(1 + r(T−a))
    lives of age a per slot. Rows are taken to be independent, with means x̄ and ḡ: the mean of a
    life's cross terms is a(a−1) ḡx̄ᵀ, and they scatter around it by a(a−1)²(E|g̃|²|x̄|² + |ḡ|²E|x̃|² +
    2ḡᵀVx̄) + a(a−1)(E|g̃|²E|x̃|² + ‖V‖²); a tilde takes the mean away, V = E g̃x̃ᵀ. Random signs
    leave no mean and a(a−1)(E|g|²E|x|² + ‖E gxᵀ‖²). Own terms still held back are missing. Rows of
    one sequence are not independent, so that a GPT scatters somewhat more.
    """
    x = torch.cat([one.x for one in batches]).double()
    g = torch.cat([one.g for one in batches]).double()
    count, rows = len(batches), len(batches[0].x)
    dense = g.t() @ x
    ages = range(1, count + 1)
    lives = [rows * ratio * (1 - ratio) ** (a - 1) * (1 + ratio * (count - a)) for a in ages]
    own = sum(n * a for n, a in zip(lives, ages, strict=True)) / (rows * count)
    pairs = sum(n * a * (a - 1) for n, a in zip(lives, ages, strict=True))
    # A row counts a − 1 times in the means' products; the means are those of these very rows.
    bent = sum(n * a * (a - 1) ** 2 for n, a in zip(lives, ages, strict=True))
    bent -= pairs**2 / (rows * count)
    mean_x, mean_g = x.mean(0), g.mean(0)
    all_x, all_g = float(x.square().sum(1).mean()), float(g.square().sum(1).mean())
    in_x, in_g = float(mean_x.square().sum()), float(mean_g.square().sum())
    sum_of_squares = float((x.square().sum(1) * g.square().sum(1)).sum())
    scatter = own * (1 - own) * sum_of_squares
    if signed:
        mean = own * dense
        scatter += pairs * (all_x * all_g + float((dense / len(x)).square().sum()))
    else:
        product = torch.outer(mean_g, mean_x)
        joint = dense / len(x) - product
        mean = own * dense + pairs * product
        scatter += bent * ((all_g - in_g) * in_x + in_g * (all_x - in_x))
        scatter += bent * 2 * float(mean_g @ joint @ mean_x)
        scatter += pairs * ((all_g - in_g) * (all_x - in_x) + float(joint.square().sum()))
    return math.sqrt(float(mean.square().sum()) + scatter) / float(dense.norm())
