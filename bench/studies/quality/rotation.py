"""A baseline: in each step a few layers get their exact weight gradient, the others none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class Rotation:
    """Freezes all but a random part of some layers' weights and biases, anew for every step.

    An optimizer of `torch.optim` leaves Parameters without a gradient as they are, moments of Adam
    included.

    Args:
        layers: Of which some are trained.
        share: How many of them, at least one.
    """

    def __init__(self, layers: Sequence[nn.Module], share: float) -> None:
        self._layers = layers
        self._count = max(1, round(share * len(layers)))

    def turn(self) -> None:
        """Choose the layers of the next step, by the global generator."""
        trained = set(torch.randperm(len(self._layers))[: self._count].tolist())
        for number, layer in enumerate(self._layers):
            layer.requires_grad_(number in trained)
