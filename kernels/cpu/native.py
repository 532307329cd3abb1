"""Calls into the C code beside this file, one pass or product each.

Every function returns `None` when it does not apply (no compiler, another system, a dtype or layout
that the C code does not take); `torch_ops` then does the same in plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memaop_triton.kernels.cpu import library
from memaop_triton.kernels.cpu.library import (
    LANES,
    address,
    apart,
    code_for,
    gemm_threads,
    matrix,
    room_for,
    sizes_of,
    threads_for,
)
from memaop_triton.kernels.cpu.picked import Picked
from memaop_triton.kernels.draws import draw_seed

_MAX_RANK = 1024
_BLOCK = 64  # columns: four of the widest vectors


def row_norms(a: Tensor) -> Tensor | None:
    """Euclidean norm of every row of `a`, or `None` if this does not apply.

    Args:
        a: [M, N], or blocks of columns, [M, blocks, multiple of 64].
    """
    code = code_for(a)
    if code is None:
        return None
    norms = a.new_empty(a.shape[0], dtype=code.number)
    if a.dim() == 2:
        code.call("row_norms", *matrix(a), norms.data_ptr(), *sizes_of(a))
        return norms
    rows, blocks, columns = a.shape
    if columns % _BLOCK:
        return None
    where = *matrix(a), a.stride(1), norms.data_ptr()
    code.call("block_norms", *where, rows, blocks, columns, threads_for(rows, blocks * columns))
    return norms


def accumulate_and_score(memory: Tensor, rows: Tensor, carry: Tensor) -> Tensor | None:
    """`memory` ← carry·memory + rows in place; the norms of its rows, or `None` (nothing done)."""
    same = memory.dtype == rows.dtype and memory.shape == rows.shape
    code = code_for(memory, rows, carry) if same else None
    if code is None or carry.dtype != code.number:
        return None
    norms = torch.empty_like(carry)
    pointers = carry.data_ptr(), norms.data_ptr()
    code.call("accumulate", *matrix(memory), *matrix(rows), *pointers, *sizes_of(memory))
    return norms


def project(x: Tensor, basis: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """Z = X Q ([M, q]) and √(‖x‖² − scale²‖z‖²) of the rows ([M]) for Q [N, q], or `None`.

    Z is in the dtype of `x`, which is that of Q too; the norms are in `score_dtype` of it, and take
    Z as it was before it was rounded to that dtype.
    """
    groups = -(-basis.shape[1] // LANES)
    wanted = x.dtype == basis.dtype and groups in range(1, 5) and x.shape[1] >= LANES
    code = code_for(x) if wanted else None
    if code is None:
        return None
    padded = x.new_zeros((x.shape[1], groups * LANES), dtype=code.number)
    padded[:, : basis.shape[1]] = basis  # of any layout: QR leaves it transposed
    z = x.new_empty((x.shape[0], groups * LANES), dtype=code.number)
    norms = x.new_empty(x.shape[0], dtype=code.number)
    *size, threads = sizes_of(x)
    code.call(
        "project",
        *(*matrix(x), padded.data_ptr(), z.data_ptr(), norms.data_ptr()),
        *(scale, *size, groups, threads),
    )
    return z[:, : basis.shape[1]].to(x.dtype), norms


def transposed_mm(
    z: Tensor, a: Tensor | Picked, norms: Tensor | None = None, sums: Tensor | None = None
) -> Tensor | None:
    """Zᵀ A ([q, N]) for z [M, q] and a [M, N], or `None` and nothing done.

    Fills `norms` ([M], in `score_dtype` like the product) with |a_i| and `sums` ([N], in the dtype
    of `a`) with the sum of the rows of `a`.

    Raises:
        IndexError: A row of `a` is not among its lines.
    """
    rows = (Picked(a) if isinstance(a, Tensor) else a).in_order()
    rank, columns = z.shape[1], rows.columns
    wanted = z.dtype == rows.lines.dtype and rank in range(4, 65, 4) and rows.length >= LANES
    code = code_for(z, rows.lines) if wanted else None
    if code is None:
        return None
    z = z.to(code.number).contiguous()
    threads = threads_for(rows.count, columns, rank)
    product = z.new_empty((rank, columns))
    exact_sums = None if sums is None else sums.to(code.number)
    room = room_for(code.number, code.call("product_room", rank, columns, threads))
    failed = code.call(
        "transposed_product",
        *(*matrix(z), rank, *_source(rows), product.data_ptr(), room.data_ptr()),
        *(address(norms), address(exact_sums), rows.count, columns, threads),
    )
    if failed:
        raise IndexError(f"a row is beyond the {len(rows.lines)} lines that it is picked from.")
    if sums is not None and exact_sums is not None:
        sums.copy_(exact_sums)
    return product


def choose(
    scores: Tensor, k: int, *, draw: bool, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor] | None:
    """`k` rows, ascending, and their weights; or `None`, and nothing is drawn.

    By priority sampling, or without `draw` those with the largest scores, with weight 1; of equal
    ones the first. Draws are those of the kernels for GPUs: from equal scores of float32 and equal
    seeds both choose the same rows with the same weights. Float64 takes the same draws, of 24 bits.

    Args:
        scores: [M] float32 or float64, non-negative; NaN counts as infinity.
        k: From 1 to M − 1.
        draw: Whether to draw.
        generator: Source of the seed of the draws (`draw_seed`).
    """
    code = code_for(scores) if scores.dtype in (torch.float32, torch.float64) else None
    if code is None:
        return None
    keys = torch.empty_like(scores)
    indices, weights = keys.new_empty(k, dtype=torch.int64), keys.new_ones(k)
    seed = draw_seed(scores.device, generator) if draw else 0
    code.call(
        "choose",
        *(scores.data_ptr(), draw, seed, keys.data_ptr(), keys.numel(), k),
        *(indices.data_ptr(), weights.data_ptr()),
    )
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
    both = Picked(x, indices), Picked(g, indices)
    return product(*both, weights, projection, indices, transposed=transposed)


def product(
    x: Picked,
    g: Picked,
    weights: Tensor | None = None,
    projection: tuple[Tensor, Tensor, Tensor] | None = None,
    z_indices: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor | None:
    """Σ_k w_k g_kᵀ x_k ([P, N]), or `None`, for K rows of either; the rest as for `gather_gemm`.

    Args:
        x: [K, N].
        g: [K, P].
        weights: [K].
        projection: Of the rows of x.
        z_indices: Rows of its z that belong to these, [K] int64; `None` if there are K of them.
        transposed: Return [N, P].

    Raises:
        IndexError: A row is not within the matrix.
    """
    # For a result smaller than a tile a GEMM has no advantage.
    wanted = x.lines.dtype == g.lines.dtype and min(x.columns, g.columns) >= LANES
    rank = 0 if projection is None else projection[1].shape[1]
    code = None
    if wanted and rank <= _MAX_RANK and library.prefers_own_gemm(x.lines.dtype):
        others = [] if weights is None else [weights]
        others += [] if projection is None else projection[1:]
        code = code_for(x.lines, g.lines, *others)
    if code is None:
        return None
    n, p, k, dtype = x.columns, g.columns, x.count, x.lines.dtype
    x, g = x.in_order(), g.in_order()  # alive until the call has returned
    z_indices = None if z_indices is None else z_indices.contiguous()
    out = x.lines.new_empty((n, p) if transposed else (p, n), dtype=code.number)
    if k + rank == 0:
        return out.zero_().to(dtype)
    weights = None if weights is None else weights.to(code.number).contiguous()
    inside: tuple[int | None, ...] = (None, 0, None, None, 0, None)
    if projection is not None:
        expand, z, zg = projection
        by_row = apart(expand.t(), code.number)
        z, zg = (a.to(code.number).contiguous() for a in (z, zg))
        inside = (*matrix(z), address(z_indices), *matrix(by_row), zg.data_ptr())
    threads = gemm_threads(k + rank, n, p)
    panels = room_for(code.number, code.call("panel_size", n, p, threads))
    failed = code.call(
        "gather_gemm",
        *(*_source(x), *_source(g), address(weights), *inside),
        *(out.data_ptr(), panels.data_ptr(), k, n, p, rank, transposed, threads),
    )
    if failed:
        raise IndexError(
            f"a row is beyond the lines that it is picked from: indices of x must be in "
            f"[0, {len(x.lines)}), those of g in [0, {len(g.lines)})."
        )
    return out.to(dtype)


def _source(rows: Picked) -> tuple[int | None, ...]:
    """As the C code takes them: lines, indices and offsets, the number of pieces and of lines."""
    pieces = 1 if rows.offsets is None else len(rows.offsets)
    where = matrix(rows.lines), address(rows.indices), address(rows.offsets)
    return *where[0], *where[1:], pieces, len(rows.lines) - rows.run + 1
