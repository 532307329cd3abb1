"""Rows that are picked from a matrix, or put together from pieces of it, without being copied."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Picked:
    """K rows that lie in the lines of a matrix.

    Attributes:
        lines: [L, C]; contiguous if rows are put together.
        indices: The line at which each row begins, [K] int64; `None` for every line in turn.
        offsets: A row is put together from pieces, which begin so many lines later, [pieces] int64,
            not negative. `None` if it is one line.
        run: Lines of a piece, one after another.
    """

    lines: Tensor
    indices: Tensor | None = None
    offsets: Tensor | None = None
    run: int = 1

    @property
    def count(self) -> int:
        """K."""
        return len(self.lines) if self.indices is None else len(self.indices)

    @property
    def columns(self) -> int:
        """Numbers of a row."""
        return self.length * (1 if self.offsets is None else len(self.offsets))

    @property
    def length(self) -> int:
        """Numbers of a piece."""
        return self.run * self.lines.shape[1]

    def in_order(self) -> Picked:
        """The same, with indices and offsets that lie one after another in memory."""
        indices = None if self.indices is None else self.indices.contiguous()
        offsets = None if self.offsets is None else self.offsets.contiguous()
        return Picked(self.lines, indices, offsets, self.run)

    def matrix(self) -> Tensor:
        """The rows, [K, columns], copied unless they are all lines."""
        if self.offsets is None:
            return self.lines if self.indices is None else self.lines.index_select(0, self.indices)
        first = self.indices
        if first is None:
            first = torch.arange(self.count, device=self.lines.device)
        begins = (first.unsqueeze(1) + self.offsets).flatten()
        shape = len(self.lines) - self.run + 1, self.length
        windows = self.lines.as_strided(shape, (self.lines.shape[1], 1))
        return windows.index_select(0, begins).view(self.count, self.columns)
