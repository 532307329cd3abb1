"""Which step it is, and whether a basis is due for another power iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from memaop_triton.kernels import targets
from memaop_triton.memory.basis import Basis
from memaop_triton.memory.capture import check_not_capturing


class RefreshClock:
    """Counts steps, those that a device replays from a graph as well.

    The host counts the steps that it runs, which takes no operation on the device; a captured step
    counts its replays there.

    Args:
        refresh_every: Steps between two refreshes.

    Attributes:
        host_step: Steps taken, without those that a device has replayed.
    """

    def __init__(self, refresh_every: int) -> None:
        self.refresh_every = refresh_every
        self.host_step = 0
        self._replayed: Tensor | None = None

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return self.host_step + (0 if self._replayed is None else int(self._replayed))

    @step.setter
    def step(self, step: int) -> None:
        self.host_step = step
        if self._replayed is not None:
            self._replayed.zero_()  # where it is, for a graph may count in it

    def count(self, device: torch.device) -> None:
        """Count a step whose rows are on `device`."""
        if device.type == "cuda" and self._replayed is None:
            check_not_capturing(device, "the count of a memory's steps")
            self._replayed = torch.zeros(1, dtype=torch.int64, device=device)
        if self._replayed is not None and targets.is_capturing(device):
            self._replayed += 1
        else:
            self.host_step += 1

    def is_due(self, device: torch.device) -> Tensor | bool:
        """Whether this step refreshes.

        The result has no value while a CUDA graph is captured: the graph computes the new basis in
        every step, and uses it where this tensor is true.
        """
        if self._replayed is not None and targets.is_capturing(device):
            return (self._replayed + self.host_step) % self.refresh_every == 0
        return self.host_step % self.refresh_every == 0

    def refresh(self, basis: Basis, a: Tensor, z: Tensor) -> None:
        """Let `basis` iterate on the rows `a` and z ∝ A Q, if that is due."""
        due = self.is_due(a.device)
        if due is not False:
            basis.iterate(a, z, due)

    def move(self, device: torch.device) -> None:
        """Move the counter to another device and keep its value."""
        if self._replayed is None or self._replayed.device == device:
            return
        if device.type == "cuda":
            self._replayed = self._replayed.to(device)
        else:
            self.host_step, self._replayed = self.step, None
