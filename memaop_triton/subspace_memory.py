"""The memory of unbiased policies: a basis of the subspace that the inputs mostly live in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from memaop_triton.config import MemAOPConfig
from memaop_triton.dispatch import project_rows, transposed_mm
from memaop_triton.layer_state import LayerState
from memaop_triton.saved_state import check_fields, check_shape


class SubspaceMemory:
    """An orthonormal basis Q (N×rank) of the subspace that the inputs of a layer mostly live in.

    The part of every row inside the subspace enters the weight gradient exactly, and only the rest
    is sampled: dW = (Gᵀ Z) Qᵀ + Σ_{m∈S} w_m G_mᵀ (X_m − Z_m Qᵀ) with Z = X Q. Whatever Q is, the
    estimate stays unbiased; the closer Q follows the leading directions of X, the smaller its
    variance. Q starts from one power iteration on the first batch and takes another,
    Q ← qr(Xᵀ Z), every `refresh_every` steps.

    Args:
        in_features: N, length of a row of X.
        rank: Dimension of the subspace, at most `in_features`.
        refresh_every: Steps between two power iterations.

    Attributes:
        basis: [N, rank] float32 (float64 for float64 inputs), or `None` before the first step.
        state: Serves a memory that is handed to `memaop_linear`.

    Raises:
        ValueError: `rank` is below 1 or does not fit `in_features`.
    """

    kind = "subspace"

    def __init__(self, in_features: int, rank: int = 16, *, refresh_every: int = 8) -> None:
        if not min(1, in_features) <= rank <= in_features:
            raise ValueError(
                f"rank={rank} does not fit rows of in_features={in_features}: it must be from 1 to "
                f"{in_features}."
            )
        if refresh_every < 1:
            raise ValueError(f"refresh_every={refresh_every} must be at least 1.")
        self.in_features = in_features
        self.rank = rank
        self.refresh_every = refresh_every
        self.basis: Tensor | None = None
        self.state: LayerState | None = None
        self._step = 0
        # A graph that replays steps counts them on its device.
        self._step_on_device: Tensor | None = None

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return self._step if self._step_on_device is None else int(self._step_on_device)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.basis is None else self.basis.nbytes

    def basis_for(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Q on the device and in the dtype of `x`; the first call makes it from `x` ([M, N])."""
        if self.basis is None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            shape = (self.in_features, self.rank)
            start = torch.randn(shape, dtype=dtype, device=x.device, generator=generator)
            self.basis = _by_column(torch.linalg.qr(start).Q)
            self._iterate(x, project_rows(x, self.basis.to(x.dtype))[0])
        elif self.basis.device != x.device:
            self._move(x.device)
        if x.is_cuda and self._step_on_device is None:
            self._step_on_device = torch.full((1,), self._step, device=x.device)
        return self.basis.to(x.dtype)

    def end_step(self, x: Tensor, z: Tensor) -> None:
        """Count a step that projected `x` ([M, N]) to `z` ∝ X Q; refresh Q when it is due.

        While a CUDA graph is captured nobody can tell when that will be: the graph then computes
        the new basis in every step, and takes it over in every `refresh_every`-th.
        """
        self._step += 1
        if self._step_on_device is not None:
            self._step_on_device += 1
            if _is_capturing(x.device):
                self._iterate(x, z, self._step_on_device % self.refresh_every == 0)
                return
        if self._step % self.refresh_every == 0:
            self._iterate(x, z)

    def _iterate(self, x: Tensor, z: Tensor, is_due: Tensor | bool = True) -> None:
        assert self.basis is not None
        product = transposed_mm(z, x).t().to(self.basis.dtype)  # [N, rank]
        # A row that is not finite must not get into Q; the gradient shows it. Nothing here waits
        # for the value, and Q stays at its address.
        taken = product.isfinite().all() & is_due
        refreshed = torch.linalg.qr(torch.where(taken, product, self.basis)).Q
        self.basis.copy_(torch.where(taken, refreshed, self.basis))

    def _move(self, device: torch.device) -> None:
        self._step = self.step
        self._step_on_device = None
        if self.basis is not None:
            self.basis = self.basis.to(device)

    def fit(self, config: MemAOPConfig, in_features: int, out_features: int) -> None:
        """Become a memory for rows of this length, with the rank of `config`, if it is not."""
        if self.in_features != in_features:
            self.reset()
            self.in_features, self.rank = in_features, config.rank_for(in_features)

    def reset(self) -> None:
        """Forget the basis; the next step starts a new one."""
        self.basis = None
        self._step = 0
        self._step_on_device = None

    def state_dict(self) -> dict[str, Any]:
        """Contents for a checkpoint. The tensor is the memory's own, not a copy."""
        state: dict[str, Any] = {"kind": self.kind, "step": self.step}
        return state if self.basis is None else state | {"basis": self.basis}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the contents of another subspace memory of the same shape (copied).

        Raises:
            ValueError: The state is of another kind or its basis of another shape.
        """
        self.check_state(state)
        self.reset()
        self._step = state["step"]
        if "basis" in state:
            self.basis = _by_column(state["basis"].clone())

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise `ValueError` if `state` cannot be loaded into this memory."""
        check_fields(self.kind, state, "step")
        if "basis" in state:
            check_shape("basis", state["basis"], (self.in_features, self.rank))

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a module conversion to its device (`fn` as in `Module._apply`).

        Not to its dtype: a basis rounded to half precision would no longer be orthonormal.
        """
        if self.basis is None:
            return
        device = fn(self.basis.new_empty(0)).device
        if device.type == "meta":
            self.reset()
        else:
            self._move(device)


def _by_column(basis: Tensor) -> Tensor:
    """`basis` column after column in memory, as `qr` leaves it.

    Products with it are rounded by its layout. A checkpoint that kept the values only would not
    resume to the bit.
    """
    return basis.t().contiguous().t()


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
