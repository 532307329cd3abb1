"""The selected outer products of rows that a memory is added to while they are loaded.

    dW = Σ_k (f_k mg[i_k] + g[i_k])ᵀ (f_k mx[i_k] + x[i_k]),   f_k = c·σ(i_k), 0 for an empty slot

X and mX are [M, N], G and mG are [M, P]. A selection that needs no scores (`randk`) never has to
see the sums of all rows: this kernel forms those it multiplies, and `score.accumulate_rest` updates
the memory of the others. Together they move 3 − K/M passes instead of 3 + K/M.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from memaop_triton.kernels import targets
from memaop_triton.kernels.gpu import launch
from memaop_triton.kernels.gpu.primitives import (
    is_aligned,
    precision,
    row_offsets,
    share_of_split,
    store_tile,
    tile_of_program,
    wrapped,
)
from memaop_triton.kernels.gpu.score import row_factors
from memaop_triton.kernels.gpu.sums import Product, add_up, parts_of
from memaop_triton.kernels.tuning import tuner
from memaop_triton.kernels.tuning.config import GemmConfig, flags, problem_of
from memaop_triton.kernels.tuning.tuner import Call


@triton.jit
def _updated(
    a_start, m_start, rows, a_row, m_row, ok, carried, factor,
    WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows of a plus factor times the carried rows of m, in the dtype of a: [BLOCK, BLOCK_K]."""
    a_places = a_start[:, None] + row_offsets(rows, a_row, WIDE)[None, :]
    m_places = m_start[:, None] + row_offsets(rows, m_row, WIDE)[None, :]
    a = tl.load(a_places, mask=ok[None, :], other=0) if MASKED else tl.load(a_places)
    m = tl.load(m_places, mask=carried[None, :], other=0)
    return (a.to(tl.float32) + factor[None, :] * m.to(tl.float32)).to(a.dtype)


@triton.jit(do_not_specialize=["M", "K", "steps", "carry", "seed"])
def residual_gemm_kernel(
    x_ptr, g_ptr, mx_ptr, mg_ptr, filled_ptr, carry, seed, index_ptr, lost_ptr, out_ptr,
    M, N, P, K, steps, x_row, x_col, g_row, g_col, mx_row, mg_row,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    GROUP: tl.constexpr, EVEN_N: tl.constexpr, EVEN_P: tl.constexpr, WIDE: tl.constexpr,
    SIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of dW over one share of the rows; the first `steps` steps are full and below M."""
    tile_p, tile_n = tile_of_program(N, P, BLOCK_N, BLOCK_P, GROUP)
    split = tl.program_id(1)
    columns_p = wrapped(tile_p, P, BLOCK_P, EVEN_P).to(tl.int64)
    columns_n = wrapped(tile_n, N, BLOCK_N, EVEN_N).to(tl.int64)
    g_start = g_ptr + columns_p * g_col
    x_start = x_ptr + columns_n * x_col
    mg_start = mg_ptr + columns_p
    mx_start = mx_ptr + columns_n
    k = tl.arange(0, BLOCK_K)
    # 0, or NaN if a row that is not selected is not finite: it must show in the gradient.
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32) + tl.load(lost_ptr)

    first, end = share_of_split(steps, SPLIT_K)
    rows = tl.load(index_ptr + first * BLOCK_K + k, mask=first * BLOCK_K + k < K, other=0)
    for step in range(first, end):
        ahead = tl.minimum(step + 1, end - 1) * BLOCK_K
        next_rows = tl.load(index_ptr + ahead + k)
        ok = rows < M
        carried, factor = row_factors(filled_ptr, carry, seed, rows, ok, SIGNED)
        g = _updated(g_start, mg_start, rows, g_row, mg_row, ok, carried, factor, WIDE, False)
        x = _updated(x_start, mx_start, rows, x_row, mx_row, ok, carried, factor, WIDE, False)
        acc = tl.dot(g, x.T, acc, input_precision=PRECISION)
        rows = next_rows

    if split == SPLIT_K - 1:
        for start in tl.range(steps * BLOCK_K, K, BLOCK_K, num_stages=1):
            rows = tl.load(index_ptr + start + k, mask=start + k < K, other=M)
            ok = rows < M
            carried, factor = row_factors(filled_ptr, carry, seed, rows, ok, SIGNED)
            g = _updated(g_start, mg_start, rows, g_row, mg_row, ok, carried, factor, WIDE, True)
            x = _updated(x_start, mx_start, rows, x_row, mx_row, ok, carried, factor, WIDE, True)
            acc = tl.dot(g, x.T, acc, input_precision=PRECISION)

    store_tile(acc, None, out_ptr, tile_p, tile_n, split, P, N, BLOCK_P, BLOCK_N, False)


def residual_gemm(
    memory: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    g: Tensor,
    indices: Tensor,
    carry: float | Tensor,
    seed: int | Tensor,
    lost: Tensor,
    *,
    signed: bool = False,
    block_rows: int = 1,
    config: GemmConfig | None = None,
) -> Tensor:
    """dW from rows to which their memory is added while they are loaded; the memory is only read.

    Args:
        memory: `(mx, mg, filled)` as in `score.accumulate_and_score`.
        x: [M, N], float16, bfloat16 or float32, any strides.
        g: [M, P], same dtype, any strides.
        indices: [K] integers, ascending, contiguous, each at most once. With blocks, rows of a last
            block that M cuts short may be named from M on; they count as zero.
        carry: c, or a tensor of one element.
        seed: Or int64 [1] on the device; the same as for the update of the other rows.
        lost: float32 [1], added to every element: 0, or NaN if a row elsewhere was not finite.
        signed: Draw σ = ±1 for every row; 1 otherwise.
        block_rows: Number of neighbouring rows the indices come in.
        config: Tile; chosen by `tuner` if `None`.

    Returns:
        [P, N] in the dtype of `x`.
    """
    (mx, mg, filled), (rows, n), p, k = memory, x.shape, g.shape[1], indices.numel()
    input_precision = precision(targets.current(x.device), x.dtype)
    if config is None:
        problem = problem_of(
            *("residual_gemm", x.dtype, rows, k, n, p),
            stored=mx.dtype,
            precision=input_precision,
            flags=flags(signed=signed, uneven=not (n % 16 == p % 16 == 0 and is_aligned(x, g))),
        )

        def make_benchmark_call() -> Call:
            full = (mx, mg, torch.ones_like(filled))  # as it is in the middle of training
            operands = (full, x, g, indices, carry, seed, lost)
            return partial(residual_gemm, *operands, signed=signed, block_rows=block_rows)

        config = tuner.choose(problem, x.device, make_benchmark_call, GemmConfig)
    out = torch.empty((p, n), dtype=x.dtype, device=x.device)
    parts = parts_of(out, config.split_k)
    launch.launch(
        residual_gemm_kernel,
        (triton.cdiv(n, config.block_n) * triton.cdiv(p, config.block_p), config.split_k),
        x_ptr=x, g_ptr=g, mx_ptr=mx, mg_ptr=mg, filled_ptr=filled.view(torch.int8),
        carry=carry, seed=seed, index_ptr=indices, lost_ptr=lost, out_ptr=parts,
        M=rows, N=n, P=p, K=k, steps=max(0, k - -rows % block_rows) // config.block_k,
        x_row=x.stride(0), x_col=x.stride(1), g_row=g.stride(0), g_col=g.stride(1),
        mx_row=mx.stride(0), mg_row=mg.stride(0),
        BLOCK_N=config.block_n, BLOCK_P=config.block_p, BLOCK_K=config.block_k,
        SPLIT_K=config.split_k, GROUP=config.group,
        EVEN_N=n % 16 == 0, EVEN_P=p % 16 == 0,
        WIDE=rows * max(x.stride(0), g.stride(0), mx.stride(0), mg.stride(0)) >= 1 << 31,
        SIGNED=signed, PRECISION=input_precision,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if parts is not out:
        add_up(Product(parts, out))
    return out
