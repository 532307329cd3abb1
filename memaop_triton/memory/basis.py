"""A basis of a low-dimensional subspace that holds most of the energy of a matrix's rows."""

from __future__ import annotations

import torch
from torch import Tensor

from memaop_triton.dispatch import orthonormalise_, power_iteration_, project_rows, runs_triton
from memaop_triton.flops import refresh_stride
from memaop_triton.kernels.cpu.torch_ops import basis_scale, norms_left
from memaop_triton.memory.capture import check_not_capturing


class Basis:
    """An orthonormal basis Q of a subspace that follows the leading directions of rows.

    It starts from one power iteration on the first rows, and takes another, Q ← qr(Aᵀ Z) with
    Z = A Q, when `iterate` is called, from about a thousand rows of a larger batch, which is
    enough; qr(A) is the orthonormal factor of A, whatever computes it. Columns come in the order
    of their importance: the first r of them are what the iteration makes of r columns alone.

    Args:
        features: Length of the rows.
        rank: Dimension of the subspace, at most `features`.
    """

    def __init__(self, features: int, rank: int) -> None:
        self.features = features
        self.rank = rank
        self._q: Tensor | None = None
        self._copies: dict[torch.dtype, Tensor] = {}

    @property
    def q(self) -> Tensor | None:
        """[features, rank] float32 (float64 for float64 rows), or `None` before the first rows."""
        return self._q

    @q.setter
    def q(self, q: Tensor | None) -> None:
        self._q = q
        self._copies = {}

    def of(self, a: Tensor, rank: int, generator: torch.Generator | None = None) -> Tensor:
        """The first `rank` columns of Q on the device and in the dtype of `a` ([M, features]).

        The first call makes Q from `a`.
        """
        if self.q is None:
            few = self.thinned(a)
            self.iterate(few, project_rows(few, self.begin(a, generator))[0])
        return self.columns(a, rank)

    def begin(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Start from random columns, on the device of `like`; they come in its dtype."""
        check_not_capturing(like.device, "the basis of a subspace")
        dtype = torch.promote_types(like.dtype, torch.float32)
        shape = (self.features, self.rank)
        start = torch.randn(shape, dtype=dtype, device=like.device, generator=generator)
        self.q = by_column(torch.linalg.qr(start).Q)
        return self.q.to(like.dtype)

    def columns(self, like: Tensor, rank: int) -> Tensor:
        """The first `rank` columns of Q on the device and in the dtype of `like`."""
        assert self.q is not None
        if self.q.device != like.device:
            check_not_capturing(like.device, "a basis on this device")
            self.move(like.device)
        return self.q[:, :rank].to(like.dtype)

    def by_row(self, like: Tensor, rank: int) -> Tensor:
        """`columns` of a copy that lies row after row in memory, as the Triton kernels take them.

        It is kept, and follows each refresh where it lies: between two of them no operation is
        needed, and a CUDA graph finds it where it was.
        """
        assert self._q is not None
        if self._q.device != like.device:
            return self.columns(like, rank).contiguous()
        copy = self._copies.get(like.dtype)
        if copy is None:
            copy = self._copies[like.dtype] = self.columns(like, self.rank).clone(
                memory_format=torch.contiguous_format
            )
        return copy if rank == self.rank else copy[:, :rank]

    def project(self, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """A Q / s and the norms of what the first `rank` columns of Q leave of each row of `a`."""
        if self._q is None or not runs_triton(a, rank=rank):
            return project_rows(a, self.of(a, rank))
        return project_rows(a, self.by_row(a, rank))

    def tensors(self, like: Tensor) -> tuple[Tensor, ...]:
        """What an iteration on rows like `like` reads and writes of it."""
        assert self._q is not None
        return (self._q, self.by_row(like, self.rank)) if runs_triton(like) else (self._q,)

    def follow(self, a: Tensor) -> None:
        """One power iteration of all columns by the rows `a` ([M, features])."""
        self.iterate(a, self.project(a, self.rank)[0])

    def iterate(self, a: Tensor, z: Tensor, is_due: Tensor | bool = True) -> None:
        """One power iteration of the first r columns, by some of the rows `a` ([M, features]).

        Args:
            a: The rows.
            z: [M, r] ∝ A Q.
            is_due: Whether to take it over.
        """
        assert self._q is not None
        q, copy, others = self._written(z.shape[1])
        power_iteration_(q, self.thinned(a), self.thinned(z), is_due, also=copy)
        for other in others:
            other.copy_(q)

    def take(self, product: Tensor, is_due: Tensor | bool = True) -> Tensor:
        """Use an orthonormal basis of the result of a power iteration on the first columns.

        Args:
            product: Aᵀ A Q of some rows A, [features, r]. Zero or not finite: is ignored.
            is_due: Whether to take it over.

        Returns:
            Whether it was taken over: bool, on the device.
        """
        q, copy, others = self._written(product.shape[1])
        taken = orthonormalise_(q, product.to(q.dtype), is_due, also=copy)
        for other in others:
            other.copy_(q)
        return taken

    def _written(self, rank: int) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """The first columns of Q, of its copy if there is one, and of copies in other dtypes."""
        assert self._q is not None
        q, copies = self._q, [*self._copies.values()]
        if rank != self.rank:
            q, copies = q[:, :rank], [copy[:, :rank] for copy in copies]
        return q, copies[0] if copies else None, copies[1:]

    def thinned(self, a: Tensor) -> Tensor:
        """The rows of `a` that an iteration reads; all of them, if they have been thinned out."""
        stride = refresh_stride(a.shape[0], self.rank)
        return a if stride == 1 else a[::stride]

    def left_of(self, a: Tensor, ranks: list[int]) -> Tensor:
        """Norms of what the first r columns leave of each row, for each r: [len(ranks), M]."""
        z, rest = self.project(a, self.rank)
        return norms_left(z, rest, basis_scale(self.features), ranks)

    def resize(self, rank: int) -> None:
        """Keep the first `rank` columns, or add random ones, which the next iterations turn."""
        if self.q is not None and rank > self.rank:
            check_not_capturing(self.q.device, "a larger basis")
            shape = (self.features, rank - self.rank)
            more = torch.randn(shape, dtype=self.q.dtype, device=self.q.device)
            self.q = by_column(torch.linalg.qr(torch.cat([self.q, more], 1)).Q)
        elif self.q is not None:
            self.q = by_column(self.q[:, :rank].clone())
        self.rank = rank

    def move(self, device: torch.device) -> None:
        """Follow the rows to another device."""
        if self.q is not None:
            self.q = self.q.to(device)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.q is None else self.q.nbytes


def by_column(basis: Tensor) -> Tensor:
    """`basis` column after column in memory, as `qr` leaves it.

    Products with it are rounded by its layout. A checkpoint that kept the values only would not
    resume to the bit.
    """
    return basis.t().contiguous().t()
