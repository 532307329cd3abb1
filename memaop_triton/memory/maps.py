"""The gradients of a convolution's outputs as rows, without bringing all into that order."""

from __future__ import annotations

import torch
from torch import Tensor

from memaop_triton.kernels.cpu import positions
from memaop_triton.kernels.cpu.picked import Picked
from memaop_triton.memory.patches import is_channels_last


class Maps:
    """G of a convolution, [M, P], with a row for each position of the output.

    Args:
        gradients: [B, P, *positions], floating point.

    Attributes:
        gradients: As given.
        shape: [M, P].
    """

    def __init__(self, gradients: Tensor) -> None:
        self.gradients = gradients
        channels = gradients.shape[1]
        self.shape = torch.Size((gradients.numel() // max(1, channels), channels))

    def norms(self) -> Tensor | None:
        """Of the rows, [M]; `None` if it is no faster to make the matrix first."""
        if is_channels_last(self.gradients):
            return None
        return positions.position_norms(self.gradients.flatten(2))

    def picked(self, indices: Tensor) -> Picked:
        """These rows, copied."""
        of_samples = self.gradients.flatten(2)
        rows = positions.gather_positions(of_samples, indices)
        if rows is None:
            count = of_samples.shape[2]
            rows = of_samples[indices // count, :, indices % count]
        return Picked(rows)

    def sum_rows(self) -> Tensor:
        """[P]."""
        return self.gradients.sum((0, *range(2, self.gradients.dim())))
