"""Which step it is, and whether a basis is due for another power iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from memaop_triton.kernels import targets
from memaop_triton.memory.basis import Basis
from memaop_triton.memory.capture import check_not_capturing


class RefreshClock:
    """Counts steps, on the device where a graph that is replayed has to count them.

    Args:
        refresh_every: Steps between two refreshes.

    Attributes:
        host_step: Steps taken, without those that a device has replayed.
    """

    def __init__(self, refresh_every: int) -> None:
        self.refresh_every = refresh_every
        self.host_step = 0
        self._on_device: Tensor | None = None

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return self.host_step if self._on_device is None else int(self._on_device)

    @step.setter
    def step(self, step: int) -> None:
        self.host_step, self._on_device = step, None

    def count(self, device: torch.device) -> None:
        """Count a step whose rows are on `device`."""
        if device.type == "cuda" and self._on_device is None:
            check_not_capturing(device, "the count of a memory's steps")
            self._on_device = torch.full((1,), self.host_step, device=device)
        self.host_step += 1
        if self._on_device is not None:
            self._on_device += 1

    def is_due(self, device: torch.device) -> Tensor | bool:
        """Whether this step refreshes.

        The result has no value while a CUDA graph is captured: the graph computes the new basis in
        every step, and uses it where this tensor is true.
        """
        if self._on_device is not None and targets.is_capturing(device):
            return self._on_device % self.refresh_every == 0
        return self.host_step % self.refresh_every == 0

    def refresh(self, basis: Basis, a: Tensor, z: Tensor) -> None:
        """Let `basis` iterate on the rows `a` and z ∝ A Q, if that is due."""
        due = self.is_due(a.device)
        if due is not False:
            basis.iterate(a, z, due)

    def move(self, device: torch.device) -> None:
        """Move the counter to another device and keep its value."""
        if self._on_device is None or self._on_device.device == device:
            return
        if device.type == "cuda":
            self._on_device = self._on_device.to(device)
        else:
            self.step = self.step
