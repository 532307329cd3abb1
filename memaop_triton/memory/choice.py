"""How noisy a weight gradient would be with each of the bases that a memory could use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memaop_triton.dispatch import row_norms
from memaop_triton.memory.basis import Basis

# What the variance must fall to before side or rank are changed.
_WORTH_A_CHANGE = 0.9


class Choice(NamedTuple):
    """A side, `"input"` or `"grad"`, and how many dimensions of its subspace are used."""

    side: str
    rank: int


def score_sums(bases: Mapping[str, Basis], ranks: list[int], x: Tensor, g: Tensor) -> Tensor:
    """Σs and Σs² over the rows of a batch for every side and rank: [sides · ranks, 2].

    With a basis of G's side, those of dX follow, whose scores are the norms of what it leaves of G:
    [ranks, 2] more.

    Args:
        bases: By side.
        ranks: To choose from.
        x: [M, N].
        g: [M, P].
    """
    sums = []
    for side, basis in bases.items():
        a, other = (x, g) if side == "input" else (g, x)
        left = basis.left_of(a, ranks)
        sums.append(_sums(left * row_norms(other)))
    if "grad" in bases:
        sums.append(_sums(left))  # G comes last
    return torch.cat(sums)


def _sums(scores: Tensor) -> Tensor:
    return torch.stack([scores.sum(1), scores.square().sum(1)], 1)


def variances(
    sums: Mapping[Choice, list[float]], rows_of: Callable[[Choice], int]
) -> dict[Choice, float]:
    """The variance of a weight gradient by choice.

    That of drawing row m with probability K s_m/Σs, which `priority` and `bernoulli` come close to,
    is (Σs)²/K − Σs².

    Args:
        sums: Σs and Σs² by choice.
        rows_of: K that a choice leaves.
    """
    return {
        choice: max(0.0, total * total / rows_of(choice) - squares)
        for choice, (total, squares) in sums.items()
    }


def better_choice(now: Choice, variance: Mapping[Choice, float]) -> Choice:
    """The choice of the least variance, or `now` where little is to be gained."""
    best = min(variance, key=lambda choice: variance[choice])
    # With NaN nothing is better.
    is_worth_it = variance[best] < _WORTH_A_CHANGE * variance.get(now, math.inf)
    return best if is_worth_it else now


class Arriving:
    """A tensor on its way to the host: nobody waits for a GPU before the numbers are asked for."""

    def __init__(self, a: Tensor) -> None:
        self._host = a
        self._event: torch.cuda.Event | None = None
        if a.is_cuda and torch.backends.cuda.is_built():  # not where a GPU is pretended
            self._host = torch.empty(a.shape, dtype=a.dtype, pin_memory=True)
            self._host.copy_(a, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def get(self) -> Tensor:
        """The tensor, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host

    def __getstate__(self) -> dict[str, Any]:
        return {"_host": self.get(), "_event": None}
