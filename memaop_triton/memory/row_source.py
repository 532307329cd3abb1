"""What a step needs of a matrix that is none: rows that are made when they are asked for."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from memaop_triton.kernels.cpu.picked import Picked


class SomeRows(Protocol):
    """The rows of X or G in another form, of which some can be had."""

    @property
    def shape(self) -> torch.Size:
        """[M, N] or [M, P]."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        ...

    @property
    def device(self) -> torch.device:
        """Where they are."""
        ...

    def __getitem__(self, rows: slice) -> Tensor:
        """Some of the rows."""
        ...


class RowSource(SomeRows, Protocol):
    """The rows of X, [M, N], in another form: kept in a few bits, or patches of a convolution."""

    def picked(self, indices: Tensor) -> Picked:
        """Rows by their numbers ([K] int64), [K, N], made when they are multiplied or before."""
        ...

    def norms(self) -> Tensor:
        """Of all rows, [M], in `score_dtype`."""
        ...

    def scores(self, g: Tensor) -> Tensor:
        """‖g_m‖·‖x_m‖ of all rows, [M], for g [M, P]."""
        ...

    def transposed_mm(self, a: Tensor) -> Tensor:
        """Aᵀ X, [q, N], for a [M, q]: a product that takes every row."""
        ...

    def project(self, basis: Tensor) -> tuple[Tensor, Tensor]:
        """`dispatch.project_rows` of all rows, for Q [N, q]: Z [M, q], and [M] norms."""
        ...
