"""The projected input gradient: its rows in a slowly moving subspace of their own."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from memaop_triton.basis import Basis, by_column
from memaop_triton.flops import projected_input_grad_flops
from memaop_triton.refresh_clock import RefreshClock
from memaop_triton.saved_state import check_shape


class GradProjection:
    """A basis Q [N, rank] of the rows of dX = G W, and with it

        Z = G (W Q)        dX ≈ Z Qᵀ

    Q starts from one power iteration on the first batch and takes another, Q ← qr(Wᵀ Gᵀ Z), every
    `refresh_every` steps, from about a thousand rows of a larger batch. What lies outside of it is
    lost: dX is not unbiased, but has no noise.

    Args:
        features: N.
        refresh_every: Steps between two power iterations.
    """

    def __init__(self, features: int, refresh_every: int) -> None:
        self.features = features
        self.refresh_every = refresh_every
        self.reset()

    def reset(self) -> None:
        """Forget the basis; the next step starts a new one."""
        self._basis: Basis | None = None
        self._clock = RefreshClock(self.refresh_every)

    @property
    def rank(self) -> int:
        """The rank in use; 0 before `start`."""
        return 0 if self._basis is None else self._basis.rank

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self._basis is None else self._basis.nbytes

    @property
    def basis(self) -> Tensor | None:
        """Q, [N, rank]; `None` before the first step."""
        return None if self._basis is None else self._basis.q

    def start(self, rank: int) -> None:
        """Begin with a basis of this rank."""
        self._basis = Basis(self.features, rank)

    def pays_for(self, rows: int, out_features: int) -> bool:
        """Whether dX of so many rows and outputs takes fewer operations than G W."""
        sizes = rows, self.features, out_features
        return projected_input_grad_flops(*sizes, self.rank, self.refresh_every) < 2 * prod(sizes)

    def input_grad(
        self, g: Tensor, weight: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """dX = G (W Q) Qᵀ, [M, N]; a step, and a refresh where it is due.

        Args:
            g: [M, P].
            weight: W, [P, N].
            generator: Source of the first basis.
        """
        basis = self._basis
        assert basis is not None
        if basis.q is None:
            few = basis.thinned(g)
            basis.take(_iterated(few, few @ (weight @ basis.begin(g, generator)), weight))
        q = basis.columns(g, basis.rank)
        z = g @ (weight @ q)
        dx = z @ q.t()
        self._clock.count(g.device)
        due = self._clock.is_due(g.device)
        if due is not False:  # writes into Q
            basis.take(_iterated(basis.thinned(g), basis.thinned(z), weight), due)
        return dx

    def move(self, device: torch.device) -> None:
        """Follow the rows to another device."""
        self._clock.leave_device()
        if self._basis is not None:
            self._basis.move(device)

    def state_dict(self) -> dict[str, Any]:
        """Contents for a checkpoint, under names of their own; empty before the first step."""
        if self.basis is None:
            return {}
        return {"projection": self.basis, "projection_step": self._clock.step}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise `ValueError` if the basis in `state` does not fit."""
        if "projection" in state:
            q = state["projection"]
            check_shape("projection", q, (self.features, *q.shape[1:2]))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave (copied)."""
        self.reset()
        if "projection" in state:
            self.start(state["projection"].shape[1])
            assert self._basis is not None
            self._basis.q = by_column(state["projection"].clone())
            self._clock.step = state["projection_step"]


def _iterated(g: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """dXᵀ Z = Wᵀ (Gᵀ Z), [N, rank], in float32 at least: in half precision it may overflow."""
    g, z, weight = (a.to(torch.promote_types(a.dtype, torch.float32)) for a in (g, z, weight))
    return weight.t() @ (g.t() @ z)
