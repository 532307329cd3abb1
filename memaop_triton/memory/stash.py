"""What a layer keeps of its inputs between forward and backward pass, in a few bits a number.

The rows of X are rounded with a random dither (`kernels.cpu.stash`), so that in the mean a product
with them is the exact one, and all of them are kept: which ones are multiplied is settled in the
backward pass, where their scores are known. Beside a subspace of X with basis Q, what it leaves is
rounded,

    X = Z E + (X − Z E),  E ∝ Qᵀ

and Z and E, bfloat16, are kept as they are: what they were rounded by is in the rest.

What dropout made of X can be kept as a stash of X, which several layers share, and a `Mask`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from memaop_triton.dispatch import (
    project_rows,
    restore_both,
    restore_rows,
    round_rows,
    row_norms,
)
from memaop_triton.kernels.cpu.picked import Picked
from memaop_triton.kernels.cpu.stash import Inside, RoundedRows
from memaop_triton.kernels.cpu.torch_ops import score_dtype
from memaop_triton.memory.mask import Mask

#: Bits of a number by the name of the setting.
BITS = {"int8": 8, "int4": 4}
# Restored at a time: a quarter of a megabyte in float32 per 64 columns.
_CHUNK_ROWS = 1024


class Stash:
    """Rows of X, [M, N], as they are kept.

    `stash[rows]` restores a slice of them. What is kept is a handful of tensors, for
    `save_for_backward` to hold (`tensors`, `from_tensors`).

    Args:
        stored: What was rounded.
        bits: Of a stored number.
        dtype: Of X.
        inside: What was taken out before.
        mask: What dropout did to the rows afterwards; only where nothing was taken out.

    Attributes:
        shape: [M, N].
        inside: The part of the rows inside of a subspace; `None` if all of them were rounded.
        mask: Applied to all rows that are restored, and to none of their norms.
    """

    def __init__(
        self,
        stored: RoundedRows,
        bits: int,
        dtype: torch.dtype,
        inside: Inside,
        mask: Mask | None = None,
    ) -> None:
        self._stored = stored
        self._bits = bits
        self.dtype = dtype
        self.shape = torch.Size((len(stored.norms), inside.expand.shape[1]))
        self.inside = inside if inside.z.shape[1] else None
        assert mask is None or self.inside is None
        self.mask = mask
        self._tensors = *(mask or ()), *stored, *inside

    @classmethod
    def of(
        cls,
        x: Tensor,
        bits: int,
        basis: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Stash:
        """Round the rows of `x` ([M, N]).

        Args:
            x: Floating point.
            bits: 4 or 8.
            basis: Q, [N, q] in the dtype of `x`, near the span of which the rows lie.
            generator: Source of the draws.
        """
        stored, inside = round_rows(x, bits, basis, generator)
        if inside is None:
            nothing = x.new_empty(0, dtype=torch.bfloat16)
            inside = Inside(nothing.view(len(x), 0), nothing.view(0, x.shape[1]))
        return cls(stored, bits, x.dtype, inside)

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor], bits: int, dtype: torch.dtype) -> Stash:
        """From what `tensors` gave."""
        *mask, numbers, scales, norms, seed, z, expand = tensors
        stored = RoundedRows(numbers, scales, norms, seed)
        return cls(stored, bits, dtype, Inside(z, expand), Mask(*mask) if mask else None)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is kept."""
        return self._tensors

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(a.nbytes for a in self._tensors)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._stored.norms.device

    @property
    def rest_norms(self) -> Tensor:
        """Norms of the rows less what is inside, as they are restored: [M], in `score_dtype`."""
        return self._stored.norms

    def norms(self) -> Tensor:
        """Norms of whole rows, [M]; NaN for a row that is not finite."""
        if self.inside is None:
            return self.rest_norms
        expand = self.inside.expand.to(self.rest_norms.dtype)
        z = self.inside.z.to(self.rest_norms.dtype)
        # E's rows are orthogonal, of one length, to the rounding of bfloat16.
        length = torch.linalg.vector_norm(expand) / len(expand) ** 0.5
        return torch.hypot(self.rest_norms, length * torch.linalg.vector_norm(z, dim=1))

    def scores(self, g: Tensor) -> Tensor:
        """‖g_m‖·‖x_m‖ of whole rows, [M], for g [M, P]."""
        return self.norms() * row_norms(g)

    def rest_and_rows_of(
        self, g: Tensor, indices: Tensor, weights: Tensor | None
    ) -> tuple[Picked, Picked, Tensor | None]:
        """Rows less what is inside, [K, N], those of `g`, [K, P], and weights still to apply."""
        x, g, weights = restore_both(self._stored, self._bits, self.shape[1], g, indices, weights)
        return Picked(self._masked(x, indices)), Picked(g), weights

    def rows(self, indices: Tensor) -> Tensor:
        """These rows, [K, N]."""
        rows = restore_rows(
            self._stored, self._bits, self.shape[1], self.dtype, indices, self.inside
        )
        return self._masked(rows, indices)

    def picked(self, indices: Tensor) -> Picked:
        """These rows, restored."""
        return Picked(self.rows(indices))

    def __getitem__(self, rows: slice) -> Tensor:
        first, end, step = rows.indices(self.shape[0])
        return self.rows(torch.arange(first, end, step, device=self.device))

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows, some at a time, and which they are."""
        for first in range(0, self.shape[0], _CHUNK_ROWS):
            here = slice(first, first + _CHUNK_ROWS)
            yield here, self[here]

    def project(self, basis: Tensor) -> tuple[Tensor, Tensor]:
        """`dispatch.project_rows` of all rows, for Q [N, q]: Z [M, q], and [M] norms."""
        parts = [project_rows(rows, basis) for _, rows in self.chunks()]
        z, rest = (torch.cat(both) for both in zip(*parts, strict=True))
        return z, rest

    def transposed_mm(self, a: Tensor, *, transposed: bool = False) -> Tensor:
        """Aᵀ X, [q, N] in `score_dtype`, for a [M, q]: a product that takes every row.

        Xᵀ A if `transposed`; either is contiguous.
        """
        dtype = score_dtype(self.dtype)
        shape = (self.shape[1], a.shape[1]) if transposed else (a.shape[1], self.shape[1])
        product = torch.zeros(shape, dtype=dtype, device=self.device)
        for here, rows in self.chunks():
            left, right = (rows, a[here]) if transposed else (a[here], rows)
            if self.dtype == dtype:
                product.addmm_(left.t(), right)
            else:
                product += (left.t() @ right).to(dtype)
        return product

    def _masked(self, rows: Tensor, indices: Tensor) -> Tensor:
        return rows if self.mask is None else self.mask.apply(rows, indices)
