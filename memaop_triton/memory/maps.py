"""Maps of a convolution as rows, one for each position, without bringing all into that order."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from memaop_triton import dispatch
from memaop_triton.kernels.cpu import positions
from memaop_triton.kernels.cpu.picked import Picked
from memaop_triton.kernels.cpu.torch_ops import basis_scale


def is_channels_last(a: Tensor) -> bool:
    """Whether the channels of a position of [B, C, *sizes] are neighbours in memory."""
    return a.movedim(1, -1).is_contiguous()


def by_position(a: Tensor) -> Tensor:
    """[B, C, *sizes] as a matrix with a row for each position; a view if channels are last."""
    rows = a.movedim(1, -1)
    if rows.is_contiguous():
        return rows.view(-1, a.shape[1])
    laid_out = positions.lay_out(a, (0,) * (a.dim() - 2))
    return (rows if laid_out is None else laid_out[0]).reshape(-1, a.shape[1])


class Maps:
    """G of a convolution, [M, P], with a row for each position of the output.

    The matrix of them is made when it is asked for. Where the channels come first and the C code
    takes them, norms, products with a basis and some of the rows do without.

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

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return self.gradients.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.gradients.device

    def matrix(self) -> Tensor:
        """All rows, [M, P]: a view, or a copy of the gradients, made once."""
        return self._matrix

    @functools.cached_property
    def _matrix(self) -> Tensor:
        return by_position(self.gradients)

    @property
    def _planes(self) -> Tensor | None:
        """[B, P, positions] for the C code; `None` where the matrix is there, or better."""
        is_made = "_matrix" in vars(self) or is_channels_last(self.gradients)
        if is_made or dispatch.runs_triton(self.gradients):
            return None
        return self.gradients.flatten(2)

    def norms(self) -> Tensor:
        """Of the rows, [M], in `score_dtype`."""
        planes = self._planes
        norms = None if planes is None else positions.position_norms(planes)
        return dispatch.row_norms(self.matrix()) if norms is None else norms

    def project(self, basis: Tensor) -> tuple[Tensor, Tensor]:
        """`dispatch.project_rows` of all rows, for Q [P, q]: Z [M, q], and [M] norms."""
        planes, scale = self._planes, basis_scale(self.shape[1])
        both = None
        if planes is not None:
            both = positions.project_positions(planes, basis / scale, scale)
        return dispatch.project_rows(self.matrix(), basis) if both is None else both

    def picked(self, indices: Tensor) -> Picked:
        """These rows, copied where there is no matrix."""
        planes = self._planes
        rows = None if planes is None else positions.gather_positions(planes, indices)
        return Picked(self.matrix(), indices) if rows is None else Picked(rows)

    def __getitem__(self, rows: slice) -> Tensor:
        first, end, step = rows.indices(self.shape[0])
        return self.picked(torch.arange(first, end, step, device=self.device)).matrix()

    def sum_rows(self) -> Tensor:
        """[P]."""
        return self.gradients.sum((0, *range(2, self.gradients.dim())))
