"""Which side and rank a subspace has: those with the smallest sampling variance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memaop_triton.dispatch import repeated, row_norms, variance_curves_
from memaop_triton.flops import RANK_STEP, refresh_stride
from memaop_triton.kernels.cpu.torch_ops import score_dtype
from memaop_triton.memory.basis import Basis
from memaop_triton.sampling.variance import POINTS, variance_at

# Fraction to which the variance must fall before side or rank are changed.
_WORTH_A_CHANGE = 0.9


class Choice(NamedTuple):
    """A side, `"input"` or `"grad"`, and how many dimensions of its subspace are used."""

    side: str
    rank: int


#: Shares of rows, and variances.
Curve = list[list[float]]
#: K that a choice leaves beside the cost of its subspace.
RowsOf = Callable[[Choice], int]


class Arriving:
    """A tensor on its way to the host, read without a synchronisation of the device."""

    def __init__(self, a: Tensor) -> None:
        self._host = a
        self._event: torch.cuda.Event | None = None
        if a.is_cuda and torch.backends.cuda.is_built():  # not where a test fakes a GPU
            self._host = torch.empty(a.shape, dtype=a.dtype, pin_memory=True)
            self._host.copy_(a, non_blocking=True)
            self._event = torch.cuda.Event()
            # The copy runs on the stream of the tensor's device, which need not be the current one.
            self._event.record(torch.cuda.current_stream(a.device))

    def get(self) -> Tensor:
        """The tensor, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host

    def __getstate__(self) -> dict[str, Any]:
        return {"_host": self.get(), "_event": None}


class Measured(NamedTuple):
    """Measured values of a batch.

    Attributes:
        rows: M.
        curves: Of the scores under each choice, as `score_curves` gives them.
        scale: What its variances are to be multiplied by, because some rows stood for all.
    """

    rows: int
    curves: list[Curve]
    scale: float


class SubspaceChoice:
    """The side and rank in use for dW, the rank in use for a sampled dX, and how they are chosen.

    Every few refreshes the scores of a batch are measured under every choice. The one with the
    smallest variance of the estimate is used, unless little is gained by the change.

    Args:
        sides: Those that have a basis.
        max_rank: Columns of the bases.
        is_rank_open: Whether the ranks below that are choices too.

    Attributes:
        side: The side in use.
        rank: The rank in use.
        input_grad_rank: The rank in use for a sampled dX, which takes the gradients' side.
        measured: The measurement that the choice is based on; `None` before the first measurement.
        arriving: A measurement that is being copied to the host: M and the curves.
    """

    measured: Measured | None
    arriving: tuple[int, Arriving] | None

    def __init__(self, sides: tuple[str, ...], max_rank: int, is_rank_open: bool) -> None:
        self.sides = sides
        self.max_rank = max_rank
        self.is_rank_open = is_rank_open
        self.side = sides[0]
        self.rank = self.input_grad_rank = max_rank
        self.forget()

    def forget(self) -> None:
        """Drop the measurement; the next step makes a new one."""
        self.measured = self.arriving = None

    @property
    def is_open(self) -> bool:
        """Whether there is more than one choice."""
        return self.is_rank_open or len(self.sides) > 1

    @property
    def ranks(self) -> list[int]:
        """The ranks to choose from."""
        if not self.is_rank_open:
            return [self.max_rank]
        return [*range(0, self.max_rank, RANK_STEP), self.max_rank]

    def cut_to(self, max_rank: int) -> None:
        """Use bases of this many columns from now on."""
        self.max_rank = max_rank
        self.rank = min(self.rank, max_rank)
        self.input_grad_rank = min(self.input_grad_rank, max_rank)
        self.forget()

    def measure(
        self, bases: Mapping[str, Basis], x: Tensor, g: Tensor, rows: int, iterate: bool
    ) -> None:
        """Measure the scores of a batch under every choice; they arrive on the host later.

        Args:
            bases: By side.
            x: [M, N], or those of its rows that `refresh_stride` leaves, like those of `g`.
            g: [M, P].
            rows: M.
            iterate: Whether the bases take a power iteration before.
        """
        self.arriving = rows, Arriving(self.curves_of(bases, x, g, iterate=iterate))

    def curves_of(
        self, bases: Mapping[str, Basis], x: Tensor, g: Tensor, *, iterate: bool
    ) -> Tensor:
        """The `score_curves` of some of the rows of a batch; arguments as for `measure`."""
        stride = refresh_stride(x.shape[0], self.max_rank)
        if stride > 1:
            x, g = x[::stride], g[::stride]

        def follow() -> tuple[Tensor]:
            if iterate:
                for side, basis in bases.items():
                    basis.follow(x if side == "input" else g)
            return (score_curves(bases, self.ranks, x, g),)

        what = ("choice of a subspace", *bases, self.is_rank_open, iterate)
        held = [a for basis in bases.values() for a in basis.tensors(x)]
        (curves,) = repeated(what, follow, (x, g, *held))
        return curves

    def choose(self, rows_of: RowsOf, rows_of_input_grad: RowsOf) -> None:
        """Choose side and rank by the newest measurement that has reached the host.

        Args:
            rows_of: K of dW beside the subspace of a choice.
            rows_of_input_grad: The same of a sampled dX.
        """
        assert self.arriving is not None
        rows, curves = self.arriving[0], self.arriving[1].get().tolist()
        self.arriving = None
        if not math.isfinite(math.fsum(itertools.chain(*itertools.chain(*curves)))):
            return  # a row was not finite: no use
        self._take(rows, curves)
        now = Choice(self.side, self.rank)
        self.side, self.rank = _better_choice(now, self.variances(rows_of))
        if "grad" in self.sides:
            choices = [Choice("grad", rank) for rank in self.ranks]
            variance = self._variances(choices, curves[-len(choices) :], rows_of_input_grad)
            now = Choice("grad", self.input_grad_rank)
            self.input_grad_rank = _better_choice(now, variance).rank

    def variances(self, rows_of: RowsOf) -> dict[Choice, float]:
        """The variance of dW under every choice, by the last measurement."""
        assert self.measured is not None
        choices = [Choice(side, rank) for side in self.sides for rank in self.ranks]
        return self._variances(choices, self.measured.curves, rows_of)

    def _take(self, rows: int, curves: list[Curve]) -> None:
        read = -(-rows // refresh_stride(rows, self.max_rank))
        self.measured = Measured(rows, curves, rows / read)

    def _variances(
        self, choices: list[Choice], curves: list[Curve], rows_of: RowsOf
    ) -> dict[Choice, float]:
        """The variance of the estimate by choice; `curves` has at least these."""
        assert self.measured is not None
        rows, _, scale = self.measured
        return {
            choice: scale * variance_at(rows_of(choice) / rows, *curve)
            for choice, curve in zip(choices, curves, strict=False)
        }

    def state_dict(self) -> dict[str, Any]:
        """Contents for a checkpoint."""
        state: dict[str, Any] = {
            "side": self.side,
            "rank": self.rank,
            "input_grad_rank": self.input_grad_rank,
        }
        if self.arriving is not None:
            state |= {"arriving_rows": self.arriving[0], "arriving": self.arriving[1].get()}
        if self.measured is not None:
            state |= {
                "measured_rows": self.measured.rows,
                "measured": torch.tensor(self.measured.curves, dtype=torch.float64),
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave (copied)."""
        self.forget()
        self.side, self.rank = state["side"], state["rank"]
        self.input_grad_rank = state["input_grad_rank"]
        if "arriving" in state:
            self.arriving = state["arriving_rows"], Arriving(state["arriving"].clone())
        if "measured" in state:
            self._take(state["measured_rows"], state["measured"].tolist())


def score_curves(bases: Mapping[str, Basis], ranks: list[int], x: Tensor, g: Tensor) -> Tensor:
    """The `variance_curve` of a batch's scores for every side and rank, [sides · ranks, 2, POINTS].

    With a basis of G's side, those of dX follow, whose scores are the norms of what it leaves of G:
    [ranks, 2, POINTS] more. The batch is x [M, N] and g [M, P].
    """
    count = len(ranks)
    lines = count * (len(bases) + ("grad" in bases))
    curves = torch.empty((lines, 2, POINTS), dtype=score_dtype(x.dtype), device=x.device)
    for place, (side, basis) in enumerate(bases.items()):
        a, other = (x, g) if side == "input" else (g, x)
        z, rest = basis.project(a, basis.rank)
        own = curves[place * count : (place + 1) * count]
        variance_curves_(own, z, rest, row_norms(other), basis.features, ranks)
        if side == "grad":
            variance_curves_(curves[-count:], z, rest, None, basis.features, ranks)
    return curves


def _better_choice(now: Choice, variance: Mapping[Choice, float]) -> Choice:
    """The choice of the least variance, or `now` where little is to be gained."""
    best = min(variance, key=lambda choice: variance[choice])
    # With NaN nothing is better.
    is_worth_it = variance[best] < _WORTH_A_CHANGE * variance.get(now, math.inf)
    return best if is_worth_it else now
