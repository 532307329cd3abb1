"""The projected input gradient: its rows in a slowly moving subspace of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memaop_triton.kernels.cpu.torch_ops import basis_scale
from memaop_triton.memory.basis import Basis, by_column
from memaop_triton.memory.refresh_clock import RefreshClock
from memaop_triton.memory.saved_state import check_shape


class GradProjection:
    """A basis Q [N, rank] of the rows of dX = G W, and with it

        Z = G (W Q)        dX ≈ Z Qᵀ

    Q starts from one power iteration on the first batch and takes another, Q ← qr(Wᵀ Gᵀ Z), every
    `refresh_every` projections, from about a thousand rows of a larger batch. What lies outside of
    it is lost: dX is not unbiased, but has no noise. A smaller batch may use fewer of the columns.

    Args:
        features: N.
        refresh_every: Projections between two power iterations.
    """

    def __init__(self, features: int, refresh_every: int) -> None:
        self.features = features
        self.clock = RefreshClock(refresh_every)
        self.reset()

    def reset(self) -> None:
        """Forget the basis; the next step starts a new one."""
        self._basis = Basis(self.features, 0)
        # Whether Q is random still: bool, on the device of Q.
        self._is_random = torch.ones((), dtype=torch.bool)
        self.clock.step = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._basis.nbytes

    @property
    def basis(self) -> Tensor | None:
        """Q, [N, rank]; `None` before the first step."""
        return self._basis.q

    def input_grad(self, g: Tensor, weight: Tensor, rank: int) -> Tensor:
        """dX = G (W Q) Qᵀ, [M, N]; a step, and a refresh where it is due.

        Args:
            g: [M, P].
            weight: W, [P, N].
            rank: Columns of Q to use. A basis that has fewer grows.
        """
        basis = self._basis
        if rank > basis.rank:
            basis.resize(rank)
        if basis.q is None:
            few = basis.thinned(g)
            self._is_random = torch.ones((), dtype=torch.bool, device=g.device)
            self._iterate(few, few @ (weight @ basis.begin(g)), weight, True)
        scale = basis_scale(self.features)  # a power of two, which keeps half precision in range
        q = basis.columns(g, rank)
        z = g @ (weight @ (q / scale))
        dx = z @ (scale * q).t()
        self.clock.count(g.device)
        due = self._is_due(g.device)
        if due is not False:  # writes into Q
            few = basis.thinned(g)
            whole = rank == basis.rank
            z = basis.thinned(z) if whole else few @ (weight @ basis.columns(g, basis.rank))
            self._iterate(few, z, weight, due)
        return dx

    def _is_due(self, device: torch.device) -> Tensor | bool:
        due = self.clock.is_due(device)
        # No basis came of a first batch of zeros, or of one that is not finite: the next makes it.
        if due is False and self.clock.host_step < self.clock.refresh_every:
            due = bool(self._is_random) if device.type == "cpu" else self._is_random.to(device)
        return due

    def _iterate(self, g: Tensor, z: Tensor, weight: Tensor, is_due: Tensor | bool) -> None:
        g, z, w = (a.to(torch.promote_types(a.dtype, torch.float32)) for a in (g, z, weight))
        # By a power of two, so that gradients of any size stay in range.
        z = torch.ldexp(z, -torch.frexp(z.abs().amax()).exponent)
        taken = self._basis.take(w.t() @ (g.t() @ z), is_due)
        self._is_random = self._is_random.to(g.device) & ~taken

    def move(self, device: torch.device) -> None:
        """Follow the rows to another device."""
        self.clock.move(device)
        self._basis.move(device)

    def state_dict(self) -> dict[str, Any]:
        """Contents for a checkpoint, under names of their own; empty before the first step."""
        if self.basis is None:
            return {}
        step, is_random = self.clock.step, bool(self._is_random)
        return {"projection": self.basis, "projection_step": step, "projection_random": is_random}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise `ValueError` if the basis in `state` does not fit."""
        shape = tuple(state["projection"].shape)
        rank = shape[1] if len(shape) == 2 else 1
        check_shape("projection", state["projection"], (self.features, rank))
        if not 1 <= rank <= self.features:
            raise ValueError(f"projection has {rank} columns for rows of {self.features}.")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave (copied)."""
        self.reset()
        if "projection" in state:
            q = by_column(state["projection"].clone())
            self._basis.q, self._basis.rank = q, q.shape[1]
            self.clock.step = state["projection_step"]
            self._is_random = torch.tensor(state["projection_random"], device=q.device)
