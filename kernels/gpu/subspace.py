"""The subspace memory's products: Z = X Q / s with the norms of what Q leaves, and Aᵀ Z.

X is [M, N], G is [M, P], Q is [N, q] with q ≤ 64. Both kernels read their large matrix once:

- `project_kernel` owns rows of X and walks over its columns, so Z and the norms √(‖x‖² − s²‖z‖²)
  are complete when it ends.
- `transposed_kernel` owns columns of A (G for Gᵀ Z, X for the refresh Xᵀ Z) and a share of the
  rows. It leaves one part of the product per share, and on request what else can be taken from
  the tile: the squares of G's rows per block of columns, and the column sums.

The correction C = Gᵀ Z − Σ_k w_k g[i_k]ᵀ z[i_k] that the gather GEMM starts from is then the sum of
the first parts minus a gather GEMM of q columns. s is a power of two near √N, see `torch_ops.py`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memaop_triton.kernels import targets
from memaop_triton.kernels.gpu import launch
from memaop_triton.kernels.gpu.gather_gemm import gather_gemm
from memaop_triton.kernels.gpu.primitives import is_aligned, precision, row_offsets
from memaop_triton.kernels.gpu.row_weights import RowWeights
from memaop_triton.kernels.gpu.score import room_for_column_sums, store_column_sums
from memaop_triton.kernels.gpu.sums import ColumnSums, Product, add_up
from memaop_triton.kernels.tuning import tuner
from memaop_triton.kernels.tuning.config import (
    GemmConfig,
    Problem,
    RowConfig,
    flags,
    padded_rank,
    problem_of,
)


@triton.jit(do_not_specialize=["M"])
def project_kernel(
    x_ptr, q_ptr, z_ptr, rest_ptr, sums_ptr, M, N, rank, scale, epsilon, x_row, x_col, q_row,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, RANK: tl.constexpr, EVEN: tl.constexpr,
    WIDE: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z[m] = x[m] Q / scale and rest[m] = ‖x_m − scale·z_m Qᵀ‖, for BLOCK_M rows.

    With SUMS also the column sums of these rows.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows beyond the last are loaded from the last one, which takes no masks, and not stored.
    row_ok = rows < M
    start = x_ptr + tl.minimum(rows, M - 1).to(tl.int64) * x_row
    r = tl.arange(0, RANK)
    z = tl.zeros((BLOCK_M, RANK), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, N, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        places = start[:, None] + columns.to(tl.int64)[None, :] * x_col
        q_places = q_ptr + row_offsets(columns, q_row, WIDE)[:, None] + r[None, :]
        q_mask = (columns < N)[:, None] & (r < rank)[None, :]
        x = tl.load(places) if EVEN else tl.load(places, mask=(columns < N)[None, :], other=0)
        q = tl.load(q_places, mask=q_mask, other=0)
        z = tl.dot(x, q, z, input_precision=PRECISION)
        value = x.to(tl.float32)
        squares += tl.sum(value * value, axis=1)
        if SUMS:
            own = tl.where(row_ok[:, None], value, 0)
            store_column_sums(own, sums_ptr, columns, columns < N, N)
    stored = (z / scale).to(z_ptr.dtype.element_ty)
    z_places = z_ptr + row_offsets(rows, rank, WIDE)[:, None] + r[None, :]
    tl.store(z_places, stored, mask=row_ok[:, None] & (r < rank)[None, :])
    inside = scale * stored.to(tl.float32)
    left = squares - tl.sum(inside * inside, axis=1)
    # A difference below the rounding error of its terms is set to that error; NaN stays NaN.
    left = tl.where(left < squares * epsilon, squares * epsilon, left)
    tl.store(rest_ptr + rows, tl.sqrt(left), mask=row_ok)


@triton.jit(do_not_specialize=["M"])
def transposed_kernel(
    a_ptr, z_ptr, parts_ptr, squares_ptr, sums_ptr, M, N, rank, a_row, a_col, z_row,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, SPLIT: tl.constexpr, RANK: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, NORMS: tl.constexpr, SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """parts[s, n] = Σ a[m, n] z[m] over the rows of share s, for BLOCK_C columns n.

    With NORMS squares[t, m] = Σ a[m, n]² over the columns of tile t, with SUMS also
    sums[s, n] = Σ a[m, n].
    """
    tile = tl.program_id(0)
    share = tl.program_id(1)
    n = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = n < N
    start = a_ptr + n.to(tl.int64) * a_col
    r = tl.arange(0, RANK)
    product = tl.zeros((BLOCK_C, RANK), tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    steps = tl.cdiv(M, BLOCK_M)
    for step in range(steps * share // SPLIT, steps * (share + 1) // SPLIT):
        m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        row_ok = m < M
        places = start[:, None] + tl.minimum(m, M - 1).to(tl.int64)[None, :] * a_row
        a = tl.load(places) if EVEN else tl.load(places, mask=inside[:, None], other=0)
        z_places = z_ptr + row_offsets(m, z_row, WIDE)[:, None] + r[None, :]
        z = tl.load(z_places, mask=row_ok[:, None] & (r < rank)[None, :], other=0)
        product = tl.dot(a, z, product, input_precision=PRECISION)
        if NORMS or SUMS:
            value = a.to(tl.float32)
            if NORMS:
                squares = tl.sum(value * value, axis=0)
                tl.store(squares_ptr + tile.to(tl.int64) * M + m, squares, mask=row_ok)
            if SUMS:
                total += tl.sum(tl.where(row_ok[None, :], value, 0), axis=1)
    line = share.to(tl.int64) * N + n
    parts_places = parts_ptr + line[:, None] * rank + r[None, :]
    tl.store(parts_places, product, mask=inside[:, None] & (r < rank)[None, :])
    if SUMS:
        tl.store(sums_ptr + line, total, mask=inside)


@triton.jit(do_not_specialize=["M", "tiles"])
def combine_kernel(rest_ptr, squares_ptr, scores_ptr, M, tiles, BLOCK: tl.constexpr):
    """scores[m] = rest[m]·√(Σ_t squares[t, m]), +Inf where that is not finite."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = m < M
    total = tl.zeros((BLOCK,), tl.float32)
    squares_ptr += m
    for _ in range(0, tiles):
        total += tl.load(squares_ptr, mask=inside, other=0)
        squares_ptr += M
    score = tl.load(rest_ptr + m, mask=inside, other=0) * tl.sqrt(total)
    score = tl.where(score < float("inf"), score, float("inf"))
    tl.store(scores_ptr + m, score, mask=inside)


class ProjectedGradient(NamedTuple):
    """What one pass over G leaves.

    Attributes:
        parts: Shares of Gᵀ Z, [S, P, q] float32.
        scores: Scores of all rows, [M] float32.
        sums: Column sums of G in its dtype, or `None`.
    """

    parts: Tensor
    scores: Tensor
    sums: ColumnSums | None


class ProjectedRows(NamedTuple):
    """What one pass over X leaves.

    Attributes:
        z: X Q / scale, [M, q] in the dtype of X.
        rest: Norms of what Q leaves of each row, [M] float32.
        sums: Column sums of X in its dtype, or `None`.
    """

    z: Tensor
    rest: Tensor
    sums: ColumnSums | None


def project(
    x: Tensor,
    basis: Tensor,
    scale: float,
    *,
    column_sums: bool = False,
    config: RowConfig | None = None,
) -> ProjectedRows:
    """Z = X Q / scale and the norms of what Q leaves of each row, in one pass over X.

    Args:
        x: [M, N], float16, bfloat16 or float32, any strides.
        basis: Q, [N, q] in the dtype of `x`, rows of unit stride, q ≤ 64, orthonormal to rounding.
        scale: s, a power of two.
        column_sums: Also sum the columns of X.
        config: Tile; chosen by `tuner` if `None`.

    Returns:
        Z, norms and sums. A norm below its rounding error is set to the size of that error.
    """
    (rows, columns), rank, q_row = x.shape, basis.shape[1], basis.stride(0)
    input_precision = precision(targets.current(x.device), x.dtype)
    if config is None:
        problem = _problem("project", x, rank, norms=False, sums=column_sums)

        def run(config: RowConfig) -> None:
            found = project(x, basis, scale, column_sums=column_sums, config=config)
            add_up(None, found.sums)

        config = tuner.choose(problem, x.device, lambda: run, RowConfig)
    z = torch.empty((rows, rank), dtype=x.dtype, device=x.device)
    rest = torch.empty(rows, dtype=torch.float32, device=x.device)
    sums = room_for_column_sums(x, config) if column_sums else None
    launch.launch(
        project_kernel,
        (triton.cdiv(rows, config.block_m),),
        x_ptr=x, q_ptr=basis, z_ptr=z, rest_ptr=rest,
        sums_ptr=None if sums is None else sums.lines,
        M=rows, N=columns, rank=rank, scale=scale, epsilon=_epsilon(x.dtype, input_precision),
        x_row=x.stride(0), x_col=x.stride(1), q_row=q_row,
        BLOCK_M=config.block_m, BLOCK_C=config.block_c, RANK=padded_rank(rank),
        EVEN=columns % config.block_c == 0, WIDE=max(rows * rank, columns * q_row) >= 1 << 31,
        SUMS=column_sums, PRECISION=input_precision,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return ProjectedRows(z, rest, sums)


def _epsilon(dtype: torch.dtype, input_precision: str) -> float:
    """The relative spacing of the numbers that Z is computed from and stored in.

    A float32 product computed as tf32 keeps ten bits of each operand.
    """
    return 2.0**-10 if input_precision == "tf32" else torch.finfo(dtype).eps


def _problem(kernel: str, a: Tensor, rank: int, *, norms: bool, sums: bool) -> Problem:
    rows, columns = a.shape
    return problem_of(
        *(kernel, a.dtype, rows, rows, columns, 0),
        rank=rank,
        precision=precision(targets.current(a.device), a.dtype),
        flags=flags(norms=norms, sums=sums, uneven=not (columns % 16 == 0 and is_aligned(a))),
    )


class _Transposed(NamedTuple):
    """What one launch of `transposed_kernel` leaves, all float32.

    Attributes:
        parts: Of Aᵀ Z, [S, N, q].
        squares: Of the rows of A per tile of columns, [T, M], or `None`.
        sums: Of the columns of A, [S, N], or `None`.
    """

    parts: Tensor
    squares: Tensor | None
    sums: Tensor | None


def _transposed(a: Tensor, z: Tensor, squares: bool, sums: bool, config: RowConfig) -> _Transposed:
    (rows, columns), rank, target = a.shape, z.shape[1], targets.current(a.device)
    tiles = triton.cdiv(columns, config.block_c)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=a.device)

    left = _Transposed(
        empty(config.split, columns, rank),
        empty(tiles, rows) if squares else None,
        empty(config.split, columns) if sums else None,
    )
    launch.launch(
        transposed_kernel,
        (tiles, config.split),
        a_ptr=a, z_ptr=z, parts_ptr=left.parts, squares_ptr=left.squares, sums_ptr=left.sums,
        M=rows, N=columns, rank=rank, a_row=a.stride(0), a_col=a.stride(1),
        z_row=z.stride(0),
        BLOCK_M=config.block_m, BLOCK_C=config.block_c, SPLIT=config.split,
        RANK=padded_rank(rank),
        EVEN=columns % config.block_c == 0, WIDE=rows * z.stride(0) >= 1 << 31,
        NORMS=squares, SUMS=sums,
        PRECISION=precision(target, a.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return left


def project_gradient(
    g: Tensor,
    z: Tensor,
    rest: Tensor,
    *,
    bias_grad: bool = False,
    config: RowConfig | None = None,
) -> ProjectedGradient:
    """Gᵀ Z, the scores ‖g_m‖·rest_m and the bias gradient, in one pass over G.

    Args:
        g: [M, P], float16, bfloat16 or float32, any strides.
        z: [M, q], same dtype, rows of unit stride.
        rest: [M] float32.
        bias_grad: Also sum the columns of G.
        config: Tile; chosen by `tuner` if `None`.
    """
    if config is None:
        problem = _problem("transposed_mm", g, z.shape[1], norms=True, sums=bias_grad)

        def run(config: RowConfig) -> None:
            # With the sums of its parts, which are taken later on.
            left = project_gradient(g, z, rest, bias_grad=bias_grad, config=config)
            add_up(Product(left.parts, torch.empty_like(left.parts[0])), left.sums)

        config = tuner.choose(problem, g.device, lambda: run, RowConfig)
    left = _transposed(g, z, True, bias_grad, config)
    rows = g.shape[0]
    scores = torch.empty(rows, dtype=torch.float32, device=g.device)
    launch.launch(
        combine_kernel,
        (triton.cdiv(rows, 256),),
        rest_ptr=rest, squares_ptr=left.squares, scores_ptr=scores,
        M=rows, tiles=triton.cdiv(g.shape[1], config.block_c),
        BLOCK=256,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    sums = None
    if left.sums is not None:
        sums = ColumnSums(left.sums, torch.empty(g.shape[1], dtype=g.dtype, device=g.device))
    return ProjectedGradient(left.parts, scores, sums)


def transposed_mm(z: Tensor, a: Tensor, *, config: RowConfig | None = None) -> Tensor:
    """Aᵀ Z, [N, q] float32, for z [M, q] (rows of unit stride) and a [M, N] of one dtype."""
    if config is None:
        problem = _problem("transposed_mm", a, z.shape[1], norms=False, sums=False)
        config = tuner.choose(problem, a.device, lambda: partial(transposed_mm, z, a), RowConfig)
    parts = _transposed(a, z, False, False, config).parts
    out = torch.empty_like(parts[0])
    add_up(Product(parts, out))
    return out


def correction(
    parts: Tensor,
    z: Tensor,
    g: Tensor,
    indices: Tensor,
    weights: Tensor | RowWeights | None,
    *,
    block_rows: int = 1,
    is_padded: bool = False,
    config: GemmConfig | None = None,
) -> Tensor:
    """C = Gᵀ Z − Σ_k w_k g[i_k]ᵀ z[i_k], [P, q] float32, from the parts of Gᵀ Z."""
    c = torch.empty_like(parts[0])
    drawn = gather_gemm(
        z,
        g,
        indices,
        weights,
        block_rows=block_rows,
        is_padded=is_padded,
        out=torch.empty_like(c),
        keeps_parts=True,
        config=config,
    )
    add_up(Product(parts, c, drawn.view(-1, *c.shape)))
    return c
