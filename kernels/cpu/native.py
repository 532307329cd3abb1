"""Calls into the C code beside this file, one pass or product each.

Every function returns `None` when it does not apply (no compiler, another system, a dtype or layout
that the C code does not take); `cpu.py` then does the same in plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memaop_triton.kernels.cpu import library as library_of_c
from memaop_triton.kernels.cpu.library import (
    KINDS,
    LANES,
    gemm_threads,
    library_for,
    matrix,
    room_for,
    sizes_of,
)

_MOST_RANK = 1024


def row_norms(a: Tensor) -> Tensor | None:
    """Euclidean norm of every row of `a` ([M, N]), or `None` if this does not apply."""
    library = library_for(a)
    if library is None:
        return None
    kind = KINDS[a.dtype]
    norms = torch.empty(a.shape[0], dtype=kind.number, device=a.device)
    kind.function(library, "row_norms")(*matrix(a), norms.data_ptr(), *sizes_of(a))
    return norms


def accumulate_and_score(memory: Tensor, rows: Tensor, carry: Tensor) -> Tensor | None:
    """`memory` ← carry·memory + rows in place; the norms of its rows, or `None` (nothing done)."""
    same = memory.dtype == rows.dtype and memory.shape == rows.shape
    library = library_for(memory, rows, carry) if same else None
    if library is None or carry.dtype != KINDS[memory.dtype].number:
        return None
    norms = torch.empty_like(carry)
    pointers = carry.data_ptr(), norms.data_ptr()
    accumulate = KINDS[memory.dtype].function(library, "accumulate")
    accumulate(*matrix(memory), *matrix(rows), *pointers, *sizes_of(memory))
    return norms


def project(x: Tensor, basis: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """Z = X Q ([M, q]) and √(‖x‖² − scale²‖z‖²) of the rows ([M]) for Q [N, q], or `None`.

    Z is in the dtype of `x`, which is that of Q too; the norms are in `score_dtype` of it, and take
    Z as it was before it was rounded to that dtype.
    """
    groups = -(-basis.shape[1] // LANES)
    wanted = x.dtype == basis.dtype and groups in range(1, 5) and x.shape[1] >= LANES
    library = library_for(x) if wanted else None
    if library is None:
        return None
    kind = KINDS[x.dtype]
    padded = x.new_zeros((x.shape[1], groups * LANES), dtype=kind.number)
    padded[:, : basis.shape[1]] = basis  # of any layout: QR leaves it transposed
    z = x.new_empty((x.shape[0], groups * LANES), dtype=kind.number)
    norms = x.new_empty(x.shape[0], dtype=kind.number)
    *size, threads = sizes_of(x)
    kind.function(library, "project")(
        *(*matrix(x), padded.data_ptr(), z.data_ptr(), norms.data_ptr()),
        *(scale, *size, groups, threads),
    )
    return z[:, : basis.shape[1]].to(x.dtype), norms


def transposed_mm(
    z: Tensor, a: Tensor, norms: Tensor | None = None, sums: Tensor | None = None
) -> Tensor | None:
    """Zᵀ A ([q, N]) for z [M, q] and a [M, N], or `None` and nothing done.

    Fills `norms` ([M], in `score_dtype` like the product) with |a_i| and `sums` ([N], in the dtype
    of `a`) with the sum of the rows of `a`.
    """
    wanted = z.dtype == a.dtype and z.shape[1] in range(4, 65, 4) and a.shape[1] >= LANES
    library = library_for(z, a) if wanted else None
    if library is None:
        return None
    kind = KINDS[a.dtype]
    z = z.to(kind.number).contiguous()
    rank, columns = z.shape[1], a.shape[1]
    *size, threads = sizes_of(a, rank)
    product = a.new_empty((rank, columns), dtype=kind.number)
    exact_sums = None if sums is None else sums.to(kind.number)
    room = room_for(kind, kind.function(library, "product_room")(rank, columns, threads))
    kind.function(library, "transposed_product")(
        *(*matrix(z), rank, *matrix(a), product.data_ptr(), room.data_ptr()),
        *(None if out is None else out.data_ptr() for out in (norms, exact_sums)),
        *(*size, threads),
    )
    if sums is not None and exact_sums is not None:
        sums.copy_(exact_sums)
    return product


def priority(scores: Tensor, uniform: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """Priority sampling: `k` rows, ascending, and their weights; or `None`.

    Args:
        scores: [M] float32 or float64, non-negative; NaN counts as infinity.
        uniform: [M] in the same dtype, in [0, 1): one less the divisor of each score.
        k: From 1 to M − 1.
    """
    if uniform.dtype != scores.dtype or uniform.shape != scores.shape:
        return None
    return _choose("priority", k, scores, uniform)


def largest(scores: Tensor, k: int) -> Tensor | None:
    """The `k` rows with the largest scores, ascending, or `None`; NaN is infinity.

    Of rows with equal scores the first ones are taken. `scores` is [M] in float32 or float64, and
    `k` from 1 to M − 1.
    """
    chosen = _choose("largest", k, scores)
    return None if chosen is None else chosen[0]


def _choose(name: str, k: int, *scores: Tensor) -> tuple[Tensor, Tensor] | None:
    """Indices and weights; a function that takes nothing but scores weights nothing."""
    dtype = scores[0].dtype
    library = library_for(*scores) if dtype in (torch.float32, torch.float64) else None
    if library is None:
        return None
    keys = torch.empty_like(scores[0])
    indices = keys.new_empty(k, dtype=torch.int64)
    weights = keys.new_empty(k if len(scores) > 1 else 0)
    results = (indices, weights) if len(scores) > 1 else (indices,)
    given = (a.data_ptr() for a in (*scores, keys))
    choose = KINDS[dtype].function(library, name)
    choose(*given, keys.numel(), k, *(a.data_ptr() for a in results))
    return indices, weights


def gather_gemm(
    x: Tensor,
    g: Tensor,
    indices: Tensor,
    weights: Tensor | None = None,
    projection: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    transposed: bool = False,
) -> Tensor | None:
    """Σ_k w_k g[i_k]ᵀ x[i_k] ([P, N]), or `None`; the arguments are those of `cpu.gather_gemm`.

    Raises:
        IndexError: An index is not in [0, M).
    """
    # A result smaller than a tile is no work for a GEMM.
    wanted = x.dtype == g.dtype and min(x.shape[1], g.shape[1]) >= LANES
    rank = 0 if projection is None else projection[1].shape[1]
    library = None
    if wanted and rank <= _MOST_RANK and library_of_c.prefers_own_gemm(x.dtype):
        others = [] if weights is None else [weights]
        others += [] if projection is None else projection[1:]
        library = library_for(x, g, *others)
    if library is None:
        return None
    kind = KINDS[x.dtype]
    (rows, n), p, k = x.shape, g.shape[1], indices.numel()
    out = x.new_empty((n, p) if transposed else (p, n), dtype=kind.number)
    if k + rank == 0:
        return out.zero_().to(x.dtype)
    indices = indices.contiguous()
    weights = None if weights is None else weights.to(kind.number).contiguous()
    inside: tuple[int | None, ...] = (None, 0, None, 0, None)
    if projection is not None:
        expand, z, zg = projection
        # Rows a power of two apart would share a few places of the cache.
        by_row = out.new_empty((rank, n + LANES))[:, :n].copy_(expand.t())
        z, zg = (a.to(kind.number).contiguous() for a in (z, zg))
        inside = (*matrix(z), *matrix(by_row), zg.data_ptr())
    threads = gemm_threads(k + rank, n, p)
    panels = room_for(kind, kind.function(library, "panel_size")(n, p, threads))
    failed = kind.function(library, "gather_gemm")(
        *(*matrix(x), *matrix(g), indices.data_ptr()),
        *(None if weights is None else weights.data_ptr(), *inside),
        *(out.data_ptr(), panels.data_ptr(), rows, k, n, p, rank, transposed, threads),
    )
    if failed:
        raise IndexError(f"indices must be in [0, {rows}), the rows of x.")
    return out.to(x.dtype)
