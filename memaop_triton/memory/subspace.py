"""The memory of unbiased policies: a basis of the subspace that rows of X or G mostly live in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from memaop_triton.config import SIDES, MemAOPConfig, check_name
from memaop_triton.dispatch import project_rows
from memaop_triton.flops import RANK_STEP, REFRESHES_PER_CHOICE, SubspaceCost, refresh_stride
from memaop_triton.memory.basis import Basis, by_column
from memaop_triton.memory.choice import Arriving, Choice, better_choice, score_sums, variances
from memaop_triton.memory.projection import GradProjection
from memaop_triton.memory.refresh_clock import RefreshClock, is_capturing
from memaop_triton.memory.saved_state import check_fields, check_shape

#: Stands for the number of rows where no batch has been seen.
MANY_ROWS = 1 << 20


class SubspaceMemory:
    """An orthonormal basis Q of the subspace that the rows of X, or those of G, mostly live in.

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
    of the estimate, (Σ_m s_m)²/K − Σ_m s_m² with the scores s and the rows K they would leave, is
    the smallest. On a GPU, where nobody waits for the numbers, it is taken a refresh later.

    Args:
        in_features: N, length of a row of X.
        out_features: P, length of a row of G.
        rank: Dimension of the subspace, at most the length of the rows it is taken from. `None`
            leaves it to a budget (`follow_budget`).
        side: `"input"`, `"grad"` or `"auto"`.
        refresh_every: Steps between two power iterations.

    Attributes:
        side: The side in use, `"input"` or `"grad"`.
        rank: The rank in use.
        input_grad_rank: The rank in use for a sampled dX, which takes the gradients' side.
        projection: The basis of a projected dX; empty unless there is one.
        layer_state: Of a memory that is handed to `memaop_linear`; nothing here reads it.

    Raises:
        ValueError: `rank` is below 1 or does not fit, `refresh_every` is below 1, or `side` is
            unknown.
    """

    kind = "subspace"

    side: str
    rank: int
    input_grad_rank: int
    # Rows, and on their way Σs and Σs² of their scores under each choice: [choices, 2].
    _pending: tuple[int, Arriving] | None
    # The same once they are there; `None` before the first look.
    _seen: tuple[int, Tensor] | None

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
        self._sides = ("input", "grad") if side == "auto" else (side,)
        self._rank_is_open = rank is None
        self.projection = GradProjection(in_features, refresh_every)
        self._clock = RefreshClock(refresh_every)
        self.set_rank(0 if rank is None else rank)
        self.layer_state: object = None

    def set_rank(self, rank: int) -> None:
        """Start anew with another rank.

        Raises:
            ValueError: It does not fit the rows.
        """
        least = 0 if self._rank_is_open else min(1, *map(self._length, self._sides))
        for side in self._sides:
            length = self._length(side)
            if not least <= rank <= length:
                name = "in_features" if side == "input" else "out_features"
                raise ValueError(
                    f"rank={rank} does not fit rows of {name}={length}: it must be from 1 to "
                    f"{length}."
                )
        self._most = rank
        self._start()

    def _length(self, side: str) -> int:
        return self.in_features if side == "input" else self.out_features

    def follow_budget(self, config: MemAOPConfig, rows: int) -> None:
        """Leave the rank open where a budget does; before the first step, fit it to `rows` rows."""
        self._rank_is_open = config.leaves_rank_open
        if self._rank_is_open and all(basis.q is None for basis in self._bases.values()):
            most = config.rank_for(rows, self.in_features, self.out_features)
            if most != self._most:
                self.set_rank(most)

    def change_budget(self, config: MemAOPConfig) -> None:
        """Go on with the rank that another budget allows, and look at the next step what is best.

        What is kept of the bases is kept; new dimensions start at random.
        """
        if self._seen is None or not self._rank_is_open:
            return
        most = config.rank_for(self._seen[0], self.in_features, self.out_features)
        if most == 0:
            self.set_rank(0)
        elif most != self._most:
            for basis in self._bases.values():
                basis.resize(most)
            self._most = most
            self.rank, self.input_grad_rank = min(self.rank, most), min(self.input_grad_rank, most)
        self._seen = self._pending = None

    def least_variance(self, config: MemAOPConfig) -> tuple[float, int, SubspaceCost] | None:
        """The variance that dW would have under `config` at best, by what was seen last.

        Returns:
            The variance, the rows that it takes, and what the subspace costs then. `None` before
            the first look, or if this memory has nothing to choose.
        """
        if self._seen is None:
            return None
        variance = self._variances(config)
        best = min(variance, key=lambda choice: variance[choice])
        cost = self._cost(*best)
        return variance[best], self._rows_left(config, cost), cost

    @property
    def basis(self) -> Tensor | None:
        """Q as it is used, [N, rank] or [P, rank]; `None` before the first step."""
        q = self._bases[self.side].q
        return None if q is None else q[:, : self.rank]

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return self._clock.step

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.projection.nbytes + sum(basis.nbytes for basis in self._bases.values())

    @property
    def cost(self) -> SubspaceCost:
        """What `flops` has to know of this memory."""
        return self._cost(self.side, self.rank)

    def _cost(self, side: str, rank: int) -> SubspaceCost:
        kept = self._most * sum(map(self._length, self._sides)) if self._has_choice else 0
        return SubspaceCost(rank, self._length(side), self.refresh_every, kept)

    def pace(self, refresh_every: int) -> None:
        """Refresh every so many steps from now on; ranks and rows stay those of `refresh_every`."""
        self._clock.refresh_every = refresh_every
        self.projection.pace(refresh_every)

    @property
    def _name(self) -> str:
        """The `side` that this memory was made with."""
        return "auto" if len(self._sides) > 1 else self._sides[0]

    @property
    def _has_choice(self) -> bool:
        return self._rank_is_open or len(self._sides) > 1

    def begin_step(
        self, x: Tensor, g: Tensor, config: MemAOPConfig, generator: torch.Generator | None = None
    ) -> None:
        """Make the bases in the first step, and choose among them when that is due.

        Args:
            x: [M, N].
            g: [M, P].
            config: The layer's.
            generator: Source of the first bases.
        """
        if self._most == 0:
            return
        is_first = self.basis is None
        if is_first:
            for side, basis in self._bases.items():
                basis.of(x if side == "input" else g, self._most, generator)
        if not self._has_choice or is_capturing(x.device):
            return
        step, every = self._clock.host_step, self._clock.refresh_every
        if self._pending is not None and step % every == 0:
            self._choose(config)
        every *= REFRESHES_PER_CHOICE
        is_new = self._seen is None and self._pending is None
        if is_new or (step > 0 and step % every == 0):
            self._look(x, g, config, iterate=not is_first)

    def basis_of(self, a: Tensor) -> Tensor:
        """Q on the device and in the dtype of `a`, the X or G of `side`."""
        return self._bases[self.side].of(a, self.rank)

    @property
    def cost_of_input_grad(self) -> SubspaceCost:
        """What `flops` has to know of this memory in a sampled dX, beside what dW pays for."""
        rank = self.input_grad_rank if "grad" in self._bases else 0
        return self._cost_of_input_grad(rank)

    def _cost_of_input_grad(self, rank: int) -> SubspaceCost:
        return SubspaceCost(rank, self.out_features, self.refresh_every, 0)

    def basis_for_input_grad(self, g: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Q of the gradients' side, [P, `input_grad_rank`], in the dtype of `g` ([M, P]).

        [P, 0] if this memory keeps none.
        """
        if "grad" not in self._bases or self._most == 0:
            return g.new_empty((g.shape[1], 0))
        return self._bases["grad"].of(g, self.input_grad_rank, generator)

    def end_input_grad(self, g: Tensor, z: Tensor, *, is_alone: bool) -> None:
        """Refresh Q of the gradients' side when it is due, unless dW has done so.

        Args:
            g: [M, P].
            z: ∝ G Q, [M, `input_grad_rank`].
            is_alone: The weight is frozen, so that no step of dW was counted.
        """
        if is_alone:
            self._clock.count(g.device)
        if is_alone or self.side != "grad":
            self._clock.refresh(self._bases["grad"], g, z)

    def _look(self, x: Tensor, g: Tensor, config: MemAOPConfig, *, iterate: bool) -> None:
        """Bring all bases up to date, and see what each would leave."""
        rows = x.shape[0]
        stride = refresh_stride(rows, self._most)
        x, g = x[::stride], g[::stride]
        if iterate:
            for side, basis in self._bases.items():
                a = x if side == "input" else g
                basis.iterate(a, project_rows(a, basis.of(a, self._most))[0])
        sums = score_sums(self._bases, self._ranks(), x, g) * (rows / x.shape[0])
        self._pending = rows, Arriving(sums)
        if self._waits_for(x.device):
            self._choose(config)

    @staticmethod
    def _waits_for(device: torch.device) -> bool:
        return device.type == "cpu"

    def _ranks(self) -> list[int]:
        """The ranks to choose from."""
        if not self._rank_is_open:
            return [self._most]
        return [*range(0, self._most, RANK_STEP), self._most]

    def _choose(self, config: MemAOPConfig) -> None:
        """Act on what the last look has seen."""
        assert self._pending is not None
        rows, sums = self._pending[0], self._pending[1].get()
        self._pending = None
        if not sums.isfinite().all():  # a row was not; nothing follows from it
            return
        self._seen = rows, sums
        now = Choice(self.side, self.rank)
        self.side, self.rank = better_choice(now, self._variances(config))
        if "grad" in self._bases:
            ranks = self._ranks()
            choices = [Choice("grad", rank) for rank in ranks]
            variance = variances(
                dict(zip(choices, self._seen[1][-len(ranks) :].tolist(), strict=True)),
                lambda c: self._rows_left(config, self._cost_of_input_grad(c.rank)),
            )
            now = Choice("grad", self.input_grad_rank)
            _, self.input_grad_rank = better_choice(now, variance)

    def _variances(self, config: MemAOPConfig) -> dict[Choice, float]:
        """Of dW by side and rank."""
        assert self._seen is not None
        choices = [Choice(side, rank) for side in self._bases for rank in self._ranks()]
        sums = dict(zip(choices, self._seen[1].tolist(), strict=False))
        return variances(sums, lambda c: self._rows_left(config, self._cost(*c)))

    def _rows_left(self, config: MemAOPConfig, cost: SubspaceCost) -> int:
        """K that `config` leaves beside a subspace, for the rows that were seen last."""
        assert self._seen is not None
        return config.num_rows(self._seen[0], self.in_features, self.out_features, cost)

    def end_step(self, a: Tensor, z: Tensor) -> None:
        """Count a step that projected `a`, X or G, to z ∝ A Q; refresh Q when it is due.

        Nothing is projected at rank 0, and z [M, 0].
        """
        self._clock.count(a.device)
        if self.rank:
            self._clock.refresh(self._bases[self.side], a, z)

    def fit(self, config: MemAOPConfig, in_features: int, out_features: int) -> None:
        """Become a memory for rows of these lengths, with the rank of `config`, if it is not."""
        if (self.in_features, self.out_features) != (in_features, out_features):
            self.in_features, self.out_features = in_features, out_features
            self.projection = GradProjection(in_features, self.refresh_every)
            self.set_rank(config.rank_for(MANY_ROWS, in_features, out_features))

    def reset(self) -> None:
        """Forget the bases; the next step starts new ones."""
        self._start()
        self.projection.reset()

    def _start(self) -> None:
        self._bases = {side: Basis(self._length(side), self._most) for side in self._sides}
        self.side = self._sides[0]
        self.rank = self.input_grad_rank = self._most
        self._clock.step = 0
        self._pending = None
        self._seen = None

    def state_dict(self) -> dict[str, Any]:
        """Contents for a checkpoint. The tensors are the memory's own, not copies."""
        state: dict[str, Any] = {"kind": self.kind, "step": self.step, "sides": self._name}
        state |= {"side": self.side, "rank": self.rank, "input_grad_rank": self.input_grad_rank}
        if self._pending is not None:
            rows, sums = self._pending
            state |= {"pending_rows": rows, "pending_sums": sums.get()}
        if self._seen is not None:
            state["seen_rows"], state["seen_sums"] = self._seen
        state |= {side: basis.q for side, basis in self._bases.items() if basis.q is not None}
        return state | self.projection.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the contents of another subspace memory of the same shape (copied).

        Raises:
            ValueError: The state is of another kind or its bases are of another shape.
        """
        self.check_state(state)
        self.set_rank(self._most_of(state))
        self._clock.step, self.side, self.rank = state["step"], state["side"], state["rank"]
        self.input_grad_rank = state["input_grad_rank"]
        if "pending_sums" in state:
            self._pending = state["pending_rows"], Arriving(state["pending_sums"].clone())
        if "seen_sums" in state:
            self._seen = state["seen_rows"], state["seen_sums"].clone()
        for side, basis in self._bases.items():
            if side in state:
                basis.q = by_column(state[side].clone())
        self.projection.load_state_dict(state)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise `ValueError` if `state` cannot be loaded into this memory."""
        check_fields(self.kind, state, "step", "sides", "side", "rank", "input_grad_rank")
        if state["sides"] != self._name:
            raise ValueError(
                f"side={state['sides']!r} in the state, {self._name!r} in this memory."
            )
        for side in self._sides:
            if side in state:
                check_shape(side, state[side], (self._length(side), self._most_of(state)))
        if "projection" in state:
            check_fields(self.kind, state, "projection_step", "projection_random")
            self.projection.check_state(state)

    def _most_of(self, state: Mapping[str, Any]) -> int:
        """The columns of a saved memory's bases, if the rank is open; else those of this one."""
        held = [state[side] for side in self._sides if side in state]
        return int(held[0].shape[-1]) if self._rank_is_open and held else self._most

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a module conversion to its device (`fn` as in `Module._apply`).

        Not to its dtype: a basis rounded to half precision would no longer be orthonormal.
        """
        held = (self._bases[self.side].q, self.projection.basis)
        q = next((q for q in held if q is not None), None)
        if q is None:
            return
        device = fn(q.new_empty(0)).device
        if device.type == "meta":
            self.reset()
            return
        self._clock.leave_device()
        for basis in self._bases.values():
            basis.move(device)
        self.projection.move(device)
