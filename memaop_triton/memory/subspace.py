"""The memory of unbiased policies: a basis of a subspace with most energy of the rows of X or G."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from memaop_triton.config import MemAOPConfig
from memaop_triton.config.parts import SIDES
from memaop_triton.errors import check_name
from memaop_triton.flops import REFRESHES_PER_CHOICE, SubspaceCost, refresh_stride
from memaop_triton.kernels import targets
from memaop_triton.memory.basis import Basis, by_column
from memaop_triton.memory.choice import Choice, SubspaceChoice
from memaop_triton.memory.projection import GradProjection
from memaop_triton.memory.refresh_clock import RefreshClock
from memaop_triton.memory.row_source import SomeRows
from memaop_triton.memory.saved_state import check_fields, check_shape

#: Number of rows to assume before the first batch.
MANY_ROWS = 1 << 20


class SubspaceMemory:
    """An orthonormal basis Q of a subspace that holds most of the energy of the rows of X, or of G.

    The part of every row inside the subspace enters the weight gradient exactly, and only the rest
    is sampled. With a basis of the inputs' side, Q [N, rank] and Z = X Q:

        dW = (Gᵀ Z) Qᵀ + Σ_{m∈S} w_m G_mᵀ (X_m − Z_m Qᵀ)

    and with one of the gradients' side, Q [P, rank] and Z = G Q:

        dW = Q (Zᵀ X) + Σ_{m∈S} w_m (G_m − Z_m Qᵀ)ᵀ X_m

    Whatever Q is, the estimate stays unbiased; the closer Q follows the leading directions, the
    smaller its variance. Q starts from one power iteration on the first batch and takes another,
    Q ← qr(Xᵀ Z) or qr(Gᵀ Z), every `refresh_every` steps, from about a thousand rows of a larger
    batch.

    `side="auto"` keeps a basis of either side, and a budget leaves the rank open as well. In the
    first step and at every fourth refresh the memory takes the side and rank for which the variance
    of the estimate (`sampling.variance`), of the scores and the rows K that they leave, is the
    smallest. On a GPU it is taken a refresh later, without a host synchronisation.

    Args:
        in_features: N, length of a row of X.
        out_features: P, length of a row of G.
        rank: Dimension of the subspace, at most the length of the rows it is taken from. `None`
            leaves it to a budget (`follow_budget`).
        side: `"input"`, `"grad"` or `"auto"`.
        refresh_every: Steps between two power iterations.

    Attributes:
        bases: The basis of every side that is kept, `"input"` and `"grad"`.
        choice: The side and rank in use, and the measurement behind them.
        projection: The basis of a projected dX; empty unless there is one.
        layer_states: By configuration, of a memory that is given to `memaop_linear`; not read here.

    Raises:
        ValueError: `rank` is below 1 or does not fit, `refresh_every` is below 1, or `side` is
            unknown.
    """

    kind = "subspace"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | None = 16,
        *,
        side: str = "auto",
        refresh_every: int = 8,
    ) -> None:
        check_name("side", side, SIDES)
        if refresh_every < 1:
            raise ValueError(f"refresh_every={refresh_every} must be at least 1.")
        self.in_features = in_features
        self.out_features = out_features
        self.refresh_every = refresh_every
        self.projection = GradProjection(in_features, refresh_every)
        self.layer_states: dict[MemAOPConfig, Any] = {}
        self._clock = RefreshClock(refresh_every)
        self._side_setting = side
        sides = ("input", "grad") if side == "auto" else (side,)
        self.choice = SubspaceChoice(sides, 0, is_rank_open=rank is None)
        self.set_rank(0 if rank is None else rank)

    def set_rank(self, rank: int) -> None:
        """Start again without bases, with another rank.

        Raises:
            ValueError: It does not fit the rows.
        """
        sides, is_rank_open = self.choice.sides, self.choice.is_rank_open
        least = 0 if is_rank_open else min(1, *map(self._length, sides))
        for side in sides:
            length = self._length(side)
            if not least <= rank <= length:
                name = "in_features" if side == "input" else "out_features"
                raise ValueError(
                    f"rank={rank} does not fit rows of {name}={length}: it must be from 1 to "
                    f"{length}."
                )
        self.bases = {side: Basis(self._length(side), rank) for side in sides}
        self.choice = SubspaceChoice(sides, rank, is_rank_open=is_rank_open)
        self._clock.step = 0

    def _length(self, side: str) -> int:
        return self.in_features if side == "input" else self.out_features

    def follow_budget(self, config: MemAOPConfig, rows: int) -> None:
        """Open the rank if `config` does; before the first step, choose it for `rows` rows."""
        if config.leaves_rank_open != self.choice.is_rank_open:
            self.choice.is_rank_open = config.leaves_rank_open
            self.choice.forget()  # the measurement is of other ranks
        if self.choice.is_rank_open and all(basis.q is None for basis in self.bases.values()):
            max_rank = config.rank_for(rows, self.in_features, self.out_features)
            if max_rank != self.choice.max_rank:
                self.set_rank(max_rank)

    def change_budget(self, config: MemAOPConfig) -> None:
        """Use the rank that another budget allows, until the next step has measured the best one.

        Columns that the bases have stay; new ones start at random.
        """
        measured = self.choice.measured
        if measured is None or not self.choice.is_rank_open:
            return
        max_rank = config.rank_for(measured.rows, self.in_features, self.out_features)
        if max_rank == 0:
            self.set_rank(0)
        elif max_rank != self.choice.max_rank:
            for basis in self.bases.values():
                basis.resize(max_rank)
            self.choice.cut_to(max_rank)
        self.choice.forget()

    def keep_rank(self) -> int:
        """Fix the rank to the one in use, or to 1 where that is 0; returns it."""
        rank = max(1, self.rank)
        for basis in self.bases.values():
            basis.resize(rank)
        self.choice.is_rank_open = False
        self.choice.cut_to(rank)
        self.choice.rank = self.choice.input_grad_rank = rank
        return rank

    def least_variance(self, config: MemAOPConfig) -> tuple[float, int, SubspaceCost] | None:
        """The variance that dW would have under `config` at best, by the last measurement.

        Returns:
            The variance, the rows that it takes, and what the subspace costs then. `None` before
            the first measurement, or if this memory has nothing to choose.
        """
        if self.choice.measured is None:
            return None
        rows_of = functools.partial(self._rows_beside, config, self._cost)
        variance = self.choice.variances(rows_of)
        best = min(variance, key=lambda choice: variance[choice])
        return variance[best], rows_of(best), self._cost(best)

    @property
    def side(self) -> str:
        """The side in use, `"input"` or `"grad"`."""
        return self.choice.side

    @property
    def rank(self) -> int:
        """The rank in use."""
        return self.choice.rank

    @property
    def basis(self) -> Tensor | None:
        """Q as it is used, [N, rank] or [P, rank]; `None` before the first step."""
        q = self.bases[self.side].q
        return None if q is None else q[:, : self.rank]

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return self._clock.step

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.projection.nbytes + sum(basis.nbytes for basis in self.bases.values())

    @property
    def cost(self) -> SubspaceCost:
        """The cost of this memory for `flops`."""
        return self._cost(Choice(self.side, self.rank))

    @property
    def cost_of_input_grad(self) -> SubspaceCost:
        """The cost of this memory for `flops` in a sampled dX, in addition to that of dW."""
        rank = self.choice.input_grad_rank if "grad" in self.bases else 0
        return self._cost_of_input_grad(Choice("grad", rank))

    def _cost(self, choice: Choice) -> SubspaceCost:
        kept = 0
        if self.choice.is_open:
            kept = self.choice.max_rank * sum(map(self._length, self.choice.sides))
        return SubspaceCost(choice.rank, self._length(choice.side), self.refresh_every, kept)

    def _cost_of_input_grad(self, choice: Choice) -> SubspaceCost:
        return self._cost(choice)._replace(kept=0)

    def _rows_beside(
        self, config: MemAOPConfig, cost: Callable[[Choice], SubspaceCost], choice: Choice
    ) -> int:
        """K that `config` leaves beside a choice, for the rows that were measured last."""
        assert self.choice.measured is not None
        rows = self.choice.measured.rows
        return config.num_rows(rows, self.in_features, self.out_features, cost(choice))

    def set_refresh_interval(self, refresh_every: int) -> None:
        """Refresh every so many steps from now on; ranks and rows stay those of `refresh_every`."""
        self._clock.refresh_every = refresh_every
        self.projection.clock.refresh_every = refresh_every

    def begin_step(
        self,
        x: Tensor | SomeRows,
        g: Tensor | SomeRows,
        config: MemAOPConfig,
        generator: torch.Generator | None = None,
    ) -> None:
        """Make the bases in the first step, and choose among them when that is due.

        Args:
            x: [M, N], or what is kept of it.
            g: [M, P], or the same of it.
            config: The layer's.
            generator: Source of the first bases.

        Raises:
            RuntimeError: The bases would be made while a CUDA graph is captured.
        """
        if self.choice.max_rank == 0:
            return
        is_first = self.bases[self.side].q is None
        if is_first:
            for side, basis in self.bases.items():
                basis.of(self._some(x if side == "input" else g), self.choice.max_rank, generator)
        if not self.choice.is_open or targets.is_capturing(x.device):
            return
        step, every = self._clock.host_step, self._clock.refresh_every
        if self.choice.arriving is not None and step % every == 0:
            self._choose(config)
        every *= REFRESHES_PER_CHOICE
        is_new = self.choice.measured is None and self.choice.arriving is None
        if is_new or (step > 0 and step % every == 0):
            self.choice.measure(self.bases, self._some(x), self._some(g), g.shape[0], not is_first)
            if self._arrives_at_once(x.device):
                self._choose(config)

    def _some(self, a: Tensor | SomeRows) -> Tensor:
        """The rows of `a` that a power iteration reads."""
        return a[:: refresh_stride(a.shape[0], self.choice.max_rank)]

    @staticmethod
    def _arrives_at_once(device: torch.device) -> bool:
        return device.type == "cpu"

    def _choose(self, config: MemAOPConfig) -> None:
        self.choice.choose(
            functools.partial(self._rows_beside, config, self._cost),
            functools.partial(self._rows_beside, config, self._cost_of_input_grad),
        )

    def basis_of(self, a: Tensor) -> Tensor:
        """Q on the device and in the dtype of `a`, the X or G of `side`."""
        return self.bases[self.side].of(a, self.rank)

    def basis_by_row(self, a: Tensor) -> Tensor:
        """The same, contiguous; there must be one."""
        return self.bases[self.side].by_row(a, self.rank)

    def basis_for_input_grad(self, g: Tensor) -> Tensor:
        """Q of the gradients' side, [P, rank], in the dtype of `g` ([M, P]).

        [P, 0] if this memory keeps none.

        Raises:
            RuntimeError: It would be made while a CUDA graph is captured.
        """
        if "grad" not in self.bases or self.choice.max_rank == 0:
            return g.new_empty((g.shape[1], 0))
        return self.bases["grad"].of(g, self.choice.input_grad_rank)

    def end_input_grad(self, g: Tensor, z: Tensor, *, is_alone: bool) -> None:
        """Refresh Q of the gradients' side when it is due, unless dW does so.

        Args:
            g: [M, P].
            z: ∝ G Q, [M, rank].
            is_alone: The weight is frozen, so that no step of dW is counted.
        """
        if is_alone:
            self._clock.count(g.device)
        if is_alone or self.side != "grad":
            self._clock.refresh(self.bases["grad"], g, z)

    def end_step(self, a: Tensor | SomeRows, z: Tensor | None = None) -> None:
        """Count a step that projected `a`, X or G, to z ∝ A Q, and refresh Q when it is due.

        Of rows that were not projected, those which that takes are projected here.
        """
        self._clock.count(a.device)
        due = self._clock.is_due(a.device) if self.rank else False
        if due is not False:
            basis = self.bases[self.side]
            if z is None or not isinstance(a, Tensor):
                a = self._some(a)
                z = basis.project(a, self.rank)[0]
            basis.iterate(a, z, due)

    def fit(self, config: MemAOPConfig, in_features: int, out_features: int) -> None:
        """Become a memory for rows of these lengths, with the rank of `config`, if it is not."""
        if (self.in_features, self.out_features) != (in_features, out_features):
            self.in_features, self.out_features = in_features, out_features
            self.projection = GradProjection(in_features, self.refresh_every)
            self.set_rank(config.rank_for(MANY_ROWS, in_features, out_features))

    def reset(self) -> None:
        """Forget the bases; the next step starts new ones."""
        self.set_rank(self.choice.max_rank)
        self.projection.reset()

    def state_dict(self) -> dict[str, Any]:
        """Contents for a checkpoint. The tensors are the memory's own, not copies."""
        state: dict[str, Any] = {"kind": self.kind, "step": self.step, "sides": self._side_setting}
        state |= self.choice.state_dict()
        state |= {side: basis.q for side, basis in self.bases.items() if basis.q is not None}
        return state | self.projection.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the contents of another subspace memory of the same shape (copied).

        Raises:
            ValueError: The state is of another kind or its bases are of another shape.
        """
        self.check_state(state)
        self.set_rank(self._max_rank_of(state))
        self._clock.step = state["step"]
        self.choice.load_state_dict(state)
        for side, basis in self.bases.items():
            if side in state:
                basis.q = by_column(state[side].clone())
        self.projection.load_state_dict(state)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise `ValueError` if `state` cannot be loaded into this memory."""
        check_fields(self.kind, state, "step", "sides", "side", "rank", "input_grad_rank")
        max_rank = self._max_rank_of(state)
        for name in ("rank", "input_grad_rank"):
            is_open = self.choice.is_rank_open
            if state[name] > max_rank or (state[name] < max_rank and not is_open):
                raise ValueError(f"{name}={state[name]} in the state, {max_rank} in this memory.")
        if state["sides"] != self._side_setting:
            raise ValueError(
                f"side={state['sides']!r} in the state, {self._side_setting!r} in this memory."
            )
        for side in self.bases:
            if side in state:
                check_shape(side, state[side], (self._length(side), max_rank))
        if "projection" in state:
            check_fields(self.kind, state, "projection_step", "projection_random")
            self.projection.check_state(state)

    def _max_rank_of(self, state: Mapping[str, Any]) -> int:
        """The columns of a saved memory's bases, if the rank is open; else those of this one."""
        held = [state[side] for side in self.bases if side in state]
        if self.choice.is_rank_open and held:
            return int(held[0].shape[-1])
        return self.choice.max_rank

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a module conversion to its device (`fn` as in `Module._apply`).

        Not to its dtype: a basis rounded to half precision would no longer be orthonormal.
        """
        held = (self.bases[self.side].q, self.projection.basis)
        q = next((q for q in held if q is not None), None)
        if q is None:
            return
        device = fn(q.new_empty(0)).device
        if device.type == "meta":
            self.reset()
            return
        self._clock.move(device)
        for basis in self.bases.values():
            basis.move(device)
        self.projection.move(device)
