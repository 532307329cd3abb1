"""A whole weight gradient in one call of the C code beside this file.

Where a layer is small, the calls of a step take longer than its arithmetic: scores, selection and
product are one call here. The same passes one by one (`cpu`, `selection`) give the same numbers.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from memaop_triton.kernels.cpu import library
from memaop_triton.kernels.cpu.library import (
    LANES,
    address,
    code_for,
    gemm_threads,
    is_plain,
    matrix,
    room_for,
    sizes_of,
)
from memaop_triton.kernels.cpu.torch_ops import basis_scale, score_dtype
from memaop_triton.kernels.draws import draw_seed


class Added(NamedTuple):
    """Rows that a memory of rows, A and B, takes before it is scored.

    Attributes:
        a: [M, N].
        b: [M, P].
        carry: [M] in `score_dtype`: what the rows of the memory are multiplied by before.
    """

    a: Tensor
    b: Tensor
    carry: Tensor


class Step(NamedTuple):
    """What a call has computed of Bᵀ A; numbers are in `score_dtype` unless another dtype is given.

    Attributes:
        rest: ‖a_m − Q Qᵀ a_m‖, [M]; without a basis the norms themselves.
        scores: Those times ‖b_m‖, [M], infinite where a row is not finite.
        indices: Rows that were selected, ascending, [K] int64.
        weights: Of these rows, [K].
        z: A Q / s in the dtype of `a`, [M, q]; [M, 0] without a basis.
        zb: Zᵀ B, [q, P].
        sums: Of the columns of B, [P] in the dtype of `b`, if `sums` was passed.
        product: [P, N], or [N, P], in the dtype of `a`; `None` if PyTorch is to multiply.
    """

    rest: Tensor
    scores: Tensor
    indices: Tensor
    weights: Tensor
    z: Tensor
    zb: Tensor
    sums: Tensor | None
    product: Tensor | None


def run(
    a: Tensor,
    b: Tensor,
    k: int,
    basis: Tensor | None = None,
    added: Added | None = None,
    *,
    draw: bool = True,
    sums: bool = False,
    transposed: bool = False,
    generator: torch.Generator | None = None,
) -> Step | None:
    """Score all rows, select `k` of them, and multiply these; `None` if this does not apply.

    Args:
        a: [M, N].
        b: [M, P].
        k: From 1 to M − 1.
        basis: Q, [N, q], column after column in memory: of a subspace in which all rows of A count,
            and beside which they are scored.
        added: What is added to A and B, in place, before all else; without a basis.
        draw: Draw the rows by priority sampling, instead of those of the largest scores.
        sums: Whether to sum the columns of B, which takes a basis.
        transposed: Return the transposed product.
        generator: Source of the seed of the draws, which are those of `native.choose`.
    """
    code = code_for(a, b, *(added or ())) if _fits(a, b, basis, added) else None
    if code is None:
        return None
    new = functools.partial(a.new_empty, dtype=code.number)
    (rows, n), p = a.shape, b.shape[1]
    rank = 0 if basis is None else basis.shape[1]
    z, zb = new((rows, -(-rank // LANES) * LANES)), new((rank, p))
    rest, scores = new(rows), new(rows)
    column_sums = new(p) if sums else None
    indices = a.new_empty(k, dtype=torch.int64)
    seed = draw_seed(a.device, generator) if draw else 0
    weights = new(k) if draw else rest.new_ones(k)
    multiplies = library.prefers_own_gemm(a.dtype)
    product = new((n, p) if transposed else (p, n)) if multiplies else None
    b_threads = sizes_of(b, rank)[-1]
    product_threads = gemm_threads(k + rank, n, p) if multiplies else 0
    numbers = code.call("step_room", rows, n, p, rank, b_threads, product_threads)
    room = room_for(code.number, numbers)
    in_and_out = z, zb, column_sums, rest, scores, indices, weights, product, room
    new_rows: tuple[int | None, ...] = (None, 0, None, 0, None)
    if added is not None:
        new_rows = (*matrix(added.a), *matrix(added.b), added.carry.data_ptr())
    code.call(
        "step",
        *(*matrix(a), *matrix(b), *new_rows),
        *((None, 0) if basis is None else matrix(basis.t())),
        *(rank, basis_scale(n), draw, seed, *map(address, in_and_out)),
        *(rows, k, n, p, transposed, sizes_of(a)[-1], b_threads, product_threads),
    )
    return Step(
        rest,
        scores,
        indices,
        weights,
        z[:, :rank].to(a.dtype),
        zb,
        None if column_sums is None else column_sums.to(b.dtype),
        None if product is None else product.to(a.dtype),
    )


def _fits(a: Tensor, b: Tensor, basis: Tensor | None, added: Added | None) -> bool:
    n, p = a.shape[1], b.shape[1]
    if a.dtype != b.dtype or min(n, p) < LANES:
        return False
    if added is not None:
        shapes = added.a.shape, added.b.shape, added.carry.shape
        if basis is not None or shapes != (a.shape, b.shape, a.shape[:1]):
            return False
        dtypes = added.a.dtype, added.b.dtype, added.carry.dtype
        return dtypes == (a.dtype, a.dtype, score_dtype(a.dtype))
    if basis is None:
        return True
    return basis.shape[1] in range(4, 65, 4) and basis.dtype == a.dtype and is_plain(basis.t())
