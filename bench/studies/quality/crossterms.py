"""Why the paper's memory hurts deep networks: the sum of its weight gradients on frozen weights.

A slot of the row memory that was selected after a batches holds Σx and Σg, and gives the outer
product (Σg)(Σx)ᵀ: the a products g xᵀ that dense would have summed, and a(a−1) cross terms that
pair rows of different batches. With frozen weights all batches are draws of one distribution, so
the sum of what a method returns over T batches can be compared with the sum of dense gradients.

With `randk` the ages are known beforehand, and so is the inflation; see `predicted_ratio`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

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
BATCHES = (1, 2, 4, 8, 16, 32, 64)
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
        error: ‖S − D‖/‖D‖.
        cross: ‖C‖/‖D‖ with C the cross terms of the slots selected so far; NaN without a memory.
        unexplained: ‖S − (D − R + C)‖/‖D‖, where R is what the memory still holds back, and C and R
            are summed from the batches by the ages of the slots; NaN but for `residual`.
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
    error: float
    cross: float
    unexplained: float
    predicted: float


def run(
    task: str,
    ratio: str,
    path: Path,
    data_dir: Path | None,
    progress: Callable[[str], None] = lambda layer: None,
) -> None:
    """All methods on all hidden layers of a task, written into the file at `path`."""
    one = tasks.TASKS[task]
    captured = capture(one, data.load(one, data_dir), TRAINED, BATCHES[-1], _MOST_ROWS)
    lines: list[CrossTerms] = []
    for layer, batches in captured.items():
        for selection, memory in METHODS:
            method = (selection, memory, value_of(ratio))
            predicted = predictions(batches, *method)
            for draw in range(draws(selection, memory)):
                lines += compare(task, layer, batches, *method, draw, predicted)
        progress(layer)
    tables.update(path, lines, lambda line: (line.task, line.ratio), lambda line: line[:2])


def draws(selection: str, memory: str) -> int:
    """How often a method is run: once if it draws nothing."""
    return DRAWS if selection == "randk" or memory == "signed" else 1


def compare(
    task: str,
    layer: str,
    batches: Sequence[Rows],
    selection: str,
    memory: str,
    ratio: float,
    draw: int = 0,
    predicted: Mapping[int, float] | None = None,
) -> Iterator[CrossTerms]:
    """One method on the batches of one layer, a line for every T of `BATCHES` that there are.

    `predicted` is what `predictions` gives, for a method that it knows.
    """
    config = MemAOPConfig(ratio=ratio, selection=selection, memory=memory)
    kept = new_memory(config, batches[0].x.shape[1], batches[0].g.shape[1])
    generator = torch.Generator().manual_seed(draw)
    slots = _Slots(batches)
    dense = torch.zeros_like(slots.cross)
    returned = torch.zeros_like(dense)
    for number, (x, g) in enumerate(batches, start=1):
        returned += weight_grad(x, g, config, kept, generator=generator)
        dense += (g.t() @ x).double()
        if isinstance(kept, ResidualMemory):
            assert kept.filled is not None
            slots.empty(number, ~kept.filled, pairing=memory == "residual")
        if number in BATCHES:
            cross = unexplained = math.nan
            size = dense.norm()
            if isinstance(kept, ResidualMemory):
                own = dense - slots.pending(number)
                cross = float((returned - own).norm() / size)
                if memory == "residual":
                    unexplained = float((returned - own - slots.cross).norm() / size)
            yield CrossTerms(
                task,
                layer,
                selection,
                memory,
                ratio,
                draw,
                number,
                float(returned.norm() / size),
                float((returned * dense).sum() / (returned.norm() * size)),
                float((returned - dense).norm() / size),
                cross,
                unexplained,
                math.nan if predicted is None else predicted[number],
            )


class _Slots:
    """What a memory that adds up rows holds back and pairs, summed from the batches themselves."""

    def __init__(self, batches: Sequence[Rows]) -> None:
        x, g = batches[0]
        self._batches = batches
        self._emptied = torch.zeros(len(x), dtype=torch.int64)  # the batch that emptied a slot
        self.cross = torch.zeros(g.shape[1], x.shape[1], dtype=torch.float64)

    def empty(self, number: int, emptied: Tensor, *, pairing: bool) -> None:
        """Note which slots batch `number` emptied ([M], bool).

        With `pairing` their cross terms are added to `cross`: those of every two batches that a
        slot lived through, in both orders.
        """
        if pairing:
            self._pair(number, emptied)
        self._emptied[emptied] = number

    def _pair(self, number: int, emptied: Tensor) -> None:
        slots = emptied.nonzero().flatten()
        slots = slots[self._emptied[slots].argsort()]  # longest lives first
        born = self._emptied[slots]
        sum_x, sum_g = (torch.zeros_like(a[slots].double()) for a in self._batches[0])
        for before in range(int(born[0]), number):
            alive = int((born <= before).sum())
            x, g = (a[slots[:alive]].double() for a in self._batches[before])
            self.cross += g.t() @ sum_x[:alive] + sum_g[:alive].t() @ x
            sum_x[:alive] += x
            sum_g[:alive] += g

    def pending(self, number: int) -> Tensor:
        """Σ g xᵀ over all rows of the first `number` batches that were not returned yet."""
        total = torch.zeros_like(self.cross)
        for before in range(int(self._emptied.min()), number):
            x, g = self._batches[before]
            held = self._emptied <= before
            total += (g[held].t() @ x[held]).double()
        return total


def predictions(
    batches: Sequence[Rows], selection: str, memory: str, ratio: float
) -> dict[int, float] | None:
    """`predicted_ratio` by T, `None` for a method about which it says nothing."""
    if selection != "randk" or memory == "none":
        return None
    signed = memory == "signed"
    counts = [count for count in BATCHES if count <= len(batches)]
    return {count: predicted_ratio(batches[:count], ratio, signed=signed) for count in counts}


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
