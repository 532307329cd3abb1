"""The selected outer products: dW = Σ_k w_k g[i_k]ᵀ x[i_k].

X is [M, N], G is [M, P], dW is [P, N]. A program owns a BLOCK_P × BLOCK_N tile of dW and walks over
the selected rows, BLOCK_K at a time: a GEMM whose two operands are gathered while they are loaded.
What that costs beside a plain GEMM, and how it is kept small:

- Rows are addressed by number. The numbers for the next step are fetched one step ahead, so that
  the copies into shared memory, which need them, are issued at once; offsets are unsigned, 32 bits
  times 32 bits, one instruction each.
- There are no masks in the main loop. Columns beyond the edge wrap around to valid ones and are not
  stored; the last rows, if they do not fill a step, go through a masked loop of their own.
- The orientation in which a tile is loaded decides whether it is copied asynchronously and 16 bytes
  at a time: G always columns first, X as the target's matrix unit wants it.
- Weights multiply the G tile in the registers that the matrix unit reads, in the operands' dtype.
- Few, small tiles leave a GPU idle, so the rows can be split over SPLIT_K programs: each stores a
  part, and a second kernel adds the parts in one order.

With a projection (`subspace.py`) dW starts from s·C Qᵀ, or s·Q Cᵀ where Q is a basis of G's side:
a correction of rank q, multiplied before the loop, so that it takes no pass over dW of its own.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memaop_triton.kernels import targets
from memaop_triton.kernels.gpu import launch
from memaop_triton.kernels.gpu.primitives import (
    first_value,
    gathered,
    is_aligned,
    precision,
    row_offsets,
    share_of_split,
    store_tile,
    tile_of_program,
    weighted,
    wrapped,
)
from memaop_triton.kernels.gpu.row_weights import RowWeights, row_weights
from memaop_triton.kernels.gpu.sums import ColumnSums, Product, add_up, parts_of
from memaop_triton.kernels.tuning import tuner
from memaop_triton.kernels.tuning.config import GemmConfig, flags, padded_rank, problem_of
from memaop_triton.kernels.tuning.tuner import Call


@triton.jit(do_not_specialize=["M", "K", "steps", "q_scale"])
def gather_gemm_kernel(
    x_ptr, g_ptr, index_ptr, weight_ptr, scale_ptr, c_ptr, q_ptr, q_scale, out_ptr,
    M, N, P, K, steps, rank, q_row, x_row, x_col, g_row, g_col,
    BLOCK_N: tl.constexpr, TILES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr, GROUP: tl.constexpr, EVEN_N: tl.constexpr, EVEN_P: tl.constexpr,
    WIDE: tl.constexpr, WEIGHTED: tl.constexpr, PADDED: tl.constexpr, SCALED: tl.constexpr,
    RANK: tl.constexpr, Q_OF_G: tl.constexpr, PRECISION: tl.constexpr,
    X_COLUMNS_FIRST: tl.constexpr,
):  # fmt: skip
    """One tile of dW over one share of the rows.

    The first `steps` steps need no masks: every index in them is below M. Later ones may be beyond
    K or name rows from M on, which count as zero. With PADDED so do rows of weight 0, which are not
    read: their weights are fetched one step ahead, too.
    """
    tile_p, tile_n = tile_of_program(N, P, TILES * BLOCK_N, BLOCK_P, GROUP)
    split = tl.program_id(1)
    g_start = g_ptr + wrapped(tile_p, P, BLOCK_P, EVEN_P).to(tl.int64) * g_col
    x_start = x_ptr + wrapped(tile_n * TILES, N, BLOCK_N, EVEN_N).to(tl.int64) * x_col
    acc = first_value(
        c_ptr, q_ptr, q_scale, scale_ptr, tile_p, tile_n * TILES, split, rank, q_row, P, N,
        BLOCK_P, BLOCK_N, RANK, Q_OF_G, PRECISION, SCALED,
    )  # fmt: skip
    if TILES == 2:
        x2_start = x_ptr + wrapped(tile_n * 2 + 1, N, BLOCK_N, EVEN_N).to(tl.int64) * x_col
        acc2 = first_value(
            c_ptr, q_ptr, q_scale, scale_ptr, tile_p, tile_n * 2 + 1, split, rank, q_row, P, N,
            BLOCK_P, BLOCK_N, RANK, Q_OF_G, PRECISION, SCALED,
        )  # fmt: skip
    k = tl.arange(0, BLOCK_K)

    first, end = share_of_split(steps, SPLIT_K)
    inside = first * BLOCK_K + k < K
    rows = tl.load(index_ptr + first * BLOCK_K + k, mask=inside, other=0)
    wanted = inside
    if PADDED:
        wanted = tl.load(weight_ptr + first * BLOCK_K + k, mask=inside, other=0) != 0
    for step in range(first, end):
        ahead = tl.minimum(step + 1, end - 1) * BLOCK_K
        next_rows = tl.load(index_ptr + ahead + k)
        x_offsets = row_offsets(rows, x_row, WIDE)
        g = gathered(g_start, row_offsets(rows, g_row, WIDE), wanted, True, PADDED)
        if WEIGHTED:
            g = weighted(g, tl.load(weight_ptr + step * BLOCK_K + k)[None, :])
        x = gathered(x_start, x_offsets, wanted, X_COLUMNS_FIRST, PADDED)
        acc = tl.dot(g, x.T, acc, input_precision=PRECISION)
        if TILES == 2:
            x2 = gathered(x2_start, x_offsets, wanted, X_COLUMNS_FIRST, PADDED)
            acc2 = tl.dot(g, x2.T, acc2, input_precision=PRECISION)
        rows = next_rows
        if PADDED:
            wanted = tl.load(weight_ptr + ahead + k) != 0

    if split == SPLIT_K - 1:
        for start in tl.range(steps * BLOCK_K, K, BLOCK_K, num_stages=1):
            rows = tl.load(index_ptr + start + k, mask=start + k < K, other=M)
            ok = rows < M
            if PADDED:
                ok = ok & (tl.load(weight_ptr + start + k, mask=start + k < K, other=0) != 0)
            ok = ok[None, :]
            x_offsets = row_offsets(rows, x_row, WIDE)[None, :]
            g_offsets = row_offsets(rows, g_row, WIDE)[None, :]
            g = tl.load(g_start[:, None] + g_offsets, mask=ok, other=0)
            if WEIGHTED:
                w = tl.load(weight_ptr + start + k, mask=start + k < K, other=0)
                g = weighted(g, w[None, :])
            x = tl.load(x_start[:, None] + x_offsets, mask=ok, other=0)
            acc = tl.dot(g, x.T, acc, input_precision=PRECISION)
            if TILES == 2:
                x2 = tl.load(x2_start[:, None] + x_offsets, mask=ok, other=0)
                acc2 = tl.dot(g, x2.T, acc2, input_precision=PRECISION)

    store_tile(
        acc, scale_ptr, out_ptr, tile_p, tile_n * TILES, split, P, N, BLOCK_P, BLOCK_N, SCALED
    )
    if TILES == 2:
        store_tile(
            acc2, scale_ptr, out_ptr, tile_p, tile_n * 2 + 1, split, P, N, BLOCK_P, BLOCK_N, SCALED
        )


@triton.jit
def _first_row(
    index_ptr, weight_ptr, step, end, M,
    BLOCK_K: tl.constexpr, BLOCK_ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Number of the first row of a step's block; M, where nothing is read, for one of weight 0."""
    block = step * BLOCK_K // BLOCK_ROWS
    row = tl.load(index_ptr + block * BLOCK_ROWS, mask=step < end, other=0).to(tl.int32)
    if PADDED:
        weight = tl.load(weight_ptr + block * BLOCK_ROWS, mask=step < end, other=0)
        row = tl.where(weight == 0, M, row)
    return row


@triton.jit(do_not_specialize=["M", "steps", "q_scale"])
def block_gemm_kernel(
    x_desc, g_desc, index_ptr, weight_ptr, scale_ptr, c_ptr, q_ptr, q_scale, out_ptr,
    M, N, P, steps, rank, q_row,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, WEIGHTED: tl.constexpr, PADDED: tl.constexpr,
    SCALED: tl.constexpr, RANK: tl.constexpr, Q_OF_G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same from whole blocks of neighbouring rows, each tile copied by descriptor.

    `index_ptr` names every row; the first of each block is read. The descriptors return zeros
    beyond row M and beyond the last column, and read nothing for them.
    """
    tile_p, tile_n = tile_of_program(N, P, BLOCK_N, BLOCK_P, GROUP)
    split = tl.program_id(1)
    acc = first_value(
        c_ptr, q_ptr, q_scale, scale_ptr, tile_p, tile_n, split, rank, q_row, P, N,
        BLOCK_P, BLOCK_N, RANK, Q_OF_G, PRECISION, SCALED,
    )  # fmt: skip
    # A step is one block, or an equal part of one.
    parts: tl.constexpr = BLOCK_ROWS // BLOCK_K
    first, end = share_of_split(steps, SPLIT_K)
    row = _first_row(index_ptr, weight_ptr, first, end, M, BLOCK_K, BLOCK_ROWS, PADDED)
    for step in range(first, end):
        ahead = tl.minimum(step + 1, end - 1)
        next_row = _first_row(index_ptr, weight_ptr, ahead, end, M, BLOCK_K, BLOCK_ROWS, PADDED)
        start = row + step % parts * BLOCK_K
        x = x_desc.load([start, tile_n * BLOCK_N])
        g = g_desc.load([start, tile_p * BLOCK_P]).T
        if WEIGHTED:
            g = weighted(g, tl.load(weight_ptr + step * BLOCK_K))
        acc = tl.dot(g, x, acc, input_precision=PRECISION)
        row = next_row

    store_tile(acc, scale_ptr, out_ptr, tile_p, tile_n, split, P, N, BLOCK_P, BLOCK_N, SCALED)


class Correction(NamedTuple):
    """What a product starts from: s·C Qᵀ, or s·Q Cᵀ.

    Attributes:
        c: C, float32 [P, q], or [N, q] if Q is of G's side; contiguous.
        q: Q, [N, q] or [P, q] in the dtype of the rows, rows of unit stride; q ≤ 64.
        scale: s.
        is_of_g: Whether Q is a basis of the rows of G.
    """

    c: Tensor
    q: Tensor
    scale: float
    is_of_g: bool = False


def gather_gemm(
    x: Tensor,
    g: Tensor,
    indices: Tensor,
    weights: Tensor | RowWeights | None = None,
    *,
    block_rows: int = 1,
    is_padded: bool = False,
    correction: Correction | None = None,
    out: Tensor | None = None,
    sums: ColumnSums | None = None,
    keeps_parts: bool = False,
    input_precision: str | None = None,
    config: GemmConfig | None = None,
) -> Tensor:
    """Σ_k w_k g[i_k]ᵀ x[i_k], plus a correction: [P, N].

    Args:
        x: [M, N], float16, bfloat16 or float32, any strides.
        g: [M, P], same dtype, any strides.
        indices: [K] integers in ascending order, contiguous. With blocks, the rows of a last block
            that M cuts short may be named from M on; they count as zero.
        weights: [K] float32, rounded to the dtype of `x` (so a result carries that rounding), or
            what `row_weights` makes of them, or `None` for all 1.
        block_rows: Number of neighbouring rows the indices come in, of one weight.
        is_padded: Rows of weight 0 (there must be `weights`) are not read, and may hold anything.
            They are multiplied all the same, as zeros.
        correction: What to start from; zeros if `None`.
        out: [P, N], contiguous, any floating dtype, overwritten; made in the dtype of `x` if
            `None`.
        sums: Column sums that are to be added up as well, in the launch that adds the parts.
        keeps_parts: Leave the parts of a split product, [S, P, N] float32, to be added up, and
            return these.
        input_precision: "ieee" or "tf32" for float32; what torch allows if `None`.
        config: Tile; chosen by `tuner` if `None`.

    Returns:
        `out`, unless its parts are kept.
    """
    if out is None:
        out = torch.empty((g.shape[1], x.shape[1]), dtype=x.dtype, device=x.device)
    target = targets.current(x.device)
    products = input_precision or precision(target, x.dtype)
    aligned = is_aligned(x, g)
    by_descriptor = aligned and block_rows > 1 and target.has_tensor_copies
    rank = 0 if correction is None else correction.q.shape[1]
    if config is None:
        wide = by_descriptor or (aligned and x.shape[1] % 16 == g.shape[1] % 16 == 0)
        problem = problem_of(
            *("gather_gemm", x.dtype, x.shape[0], indices.numel(), x.shape[1], g.shape[1]),
            rank=rank,
            precision=products,
            flags=flags(blocks=by_descriptor, uneven=not wide, weighted=weights is not None),
            block_rows=block_rows if by_descriptor else 1,
        )

        def make_benchmark_call() -> Call:
            return partial(
                gather_gemm,
                x,
                g,
                indices,
                weights,
                block_rows=block_rows,
                is_padded=is_padded,
                correction=correction,
                out=torch.empty_like(out),
                input_precision=input_precision,
            )

        config = tuner.choose(problem, x.device, make_benchmark_call, GemmConfig)
    if isinstance(weights, Tensor):
        weights = row_weights(weights, target, x.dtype)
    job = _Job(
        x=x, g=g, indices=indices, weights=weights, correction=correction,
        parts=parts_of(out, config.split_k), rank=rank, block_rows=block_rows, is_padded=is_padded,
        precision=products,
    )  # fmt: skip
    if by_descriptor:
        _by_blocks(job, config)
    else:
        _by_rows(job, config)
    if keeps_parts:
        return job.parts
    product = None if job.parts is out else Product(job.parts, out)
    if product is not None or sums is not None:
        add_up(product, sums)
    return out


class _Job(NamedTuple):
    """What one of the two kernels is launched on."""

    x: Tensor
    g: Tensor
    indices: Tensor
    weights: RowWeights | None
    correction: Correction | None
    parts: Tensor
    rank: int
    block_rows: int
    is_padded: bool
    precision: str


def _by_rows(job: _Job, config: GemmConfig) -> None:
    """Launch the kernel that reaches every row by its own pointer."""
    x, g = job.x, job.g
    (rows, n), p, k = x.shape, g.shape[1], job.indices.numel()
    launch.launch(
        gather_gemm_kernel,
        _grid(job, config),
        x_ptr=x, g_ptr=g, out_ptr=job.parts, M=rows, N=n, P=p, K=k,
        steps=max(0, k - -rows % job.block_rows) // config.block_k,
        x_row=x.stride(0), x_col=x.stride(1), g_row=g.stride(0), g_col=g.stride(1),
        BLOCK_N=config.block_n // config.tiles_n, BLOCK_P=config.block_p, BLOCK_K=config.block_k,
        TILES=config.tiles_n, SPLIT_K=config.split_k, GROUP=config.group,
        EVEN_N=n % 16 == 0, EVEN_P=p % 16 == 0,
        WIDE=rows * max(x.stride(0), g.stride(0)) >= 1 << 31,
        X_COLUMNS_FIRST=config.x_columns_first,
        num_warps=config.num_warps, num_stages=config.num_stages,
        **_shared_arguments(job),
    )  # fmt: skip


def _by_blocks(job: _Job, config: GemmConfig) -> None:
    """Launch the kernel that copies blocks of rows by descriptor."""
    block_k = min(config.block_k, job.block_rows)
    launch.launch(
        block_gemm_kernel,
        _grid(job, config),
        x_desc=TensorDescriptor.from_tensor(job.x, [block_k, config.block_n]),
        g_desc=TensorDescriptor.from_tensor(job.g, [block_k, config.block_p]),
        out_ptr=job.parts, M=job.x.shape[0], N=job.x.shape[1], P=job.g.shape[1],
        steps=triton.cdiv(job.indices.numel(), block_k),
        BLOCK_N=config.block_n, BLOCK_P=config.block_p, BLOCK_K=block_k,
        SPLIT_K=config.split_k, GROUP=config.group, BLOCK_ROWS=job.block_rows,
        num_warps=config.num_warps, num_stages=config.num_stages,
        **_shared_arguments(job),
    )  # fmt: skip


def _shared_arguments(job: _Job) -> dict[str, Any]:
    """The arguments that both kernels take for selection, weights and correction."""
    factors, scale = job.weights or (None, None)
    c, q, q_scale, is_of_g = job.correction or (None, None, 1.0, False)
    return {
        "index_ptr": job.indices, "weight_ptr": factors, "scale_ptr": scale,
        "c_ptr": c, "q_ptr": q, "q_scale": q_scale, "rank": job.rank,
        "q_row": job.rank if q is None else q.stride(0),
        "WEIGHTED": factors is not None, "PADDED": job.is_padded, "SCALED": scale is not None,
        "RANK": padded_rank(job.rank) if job.rank else 0, "Q_OF_G": is_of_g,
        "PRECISION": job.precision,
    }  # fmt: skip


def _grid(job: _Job, config: GemmConfig) -> tuple[int, int]:
    n, p = job.x.shape[1], job.g.shape[1]
    return triton.cdiv(n, config.block_n) * triton.cdiv(p, config.block_p), config.split_k
