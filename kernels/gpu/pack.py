"""The selected rows, side by side: what a plain GEMM takes.

X and mX are [M, N], G and mG are [M, P]. One launch gathers the selected rows of both, adds what a
row memory carries over, and stores them as [K, N] and [K, P]:

    f_k mx[i_k] + x[i_k]        f_k mg[i_k] + g[i_k]        f_k = c·σ(i_k), 0 for an empty slot

A product that forms its operands while it loads them does so once for every tile of the other
operand. Here each number is formed once, and then a library's GEMM reads it as often as it likes.
That is for sums that are stored nowhere, those of a selection without scores (`randk`);
`gather_gemm` multiplies rows that lie in memory without the detour.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memaop_triton.kernels.gpu import launch
from memaop_triton.kernels.gpu.primitives import row_offsets
from memaop_triton.kernels.gpu.score import row_factors

ROWS, COLUMNS = 8, 256  # of a tile: two copies of 16 bytes for each of 128 threads


class PackedRows(NamedTuple):
    """Selected rows in their order: [K, N] and [K, P], contiguous."""

    x: Tensor
    g: Tensor


@triton.jit
def _pack_tile(
    a_ptr, m_ptr, out_ptr, index_ptr, filled_ptr, carry, seed, tile, M, K, count, a_row, a_col,
    m_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """ROWS packed rows of one matrix, COLUMNS of its `count` columns."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    wanted = (place < K)[:, None] & (columns < count)[None, :]
    rows = tl.load(index_ptr + place, mask=place < K, other=M)
    exists = rows < M  # a cut block names rows beyond the last one, which count as zero
    carried, factor = row_factors(filled_ptr, carry, seed, rows, exists, SIGNED)
    a_places = (a_ptr + row_offsets(rows, a_row, WIDE))[:, None] + row_offsets(
        columns, a_col, WIDE
    )[None, :]
    a = tl.load(a_places, mask=wanted & exists[:, None], other=0)
    m_places = (m_ptr + row_offsets(rows, m_row, WIDE))[:, None] + columns[None, :]
    m = tl.load(m_places, mask=wanted & carried[:, None], other=0)
    value = a.to(tl.float32) + factor[:, None] * m.to(tl.float32)
    out_places = (out_ptr + place.to(tl.int64) * count)[:, None] + columns[None, :]
    tl.store(out_places, value.to(a.dtype), mask=wanted)


@triton.jit(do_not_specialize=["M", "K", "carry", "seed"])
def pack_kernel(
    x_ptr, g_ptr, mx_ptr, mg_ptr, px_ptr, pg_ptr, index_ptr, filled_ptr, carry, seed, M, K, N, P,
    x_row, x_col, g_row, g_col, mx_row, mg_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The first programs along axis 1 have tiles of X, the others of G."""
    tile = tl.program_id(1)
    tiles_of_x = tl.cdiv(N, COLUMNS)
    if tile < tiles_of_x:
        _pack_tile(
            x_ptr, mx_ptr, px_ptr, index_ptr, filled_ptr, carry, seed, tile, M, K, N, x_row, x_col,
            mx_row, ROWS, COLUMNS, SIGNED, WIDE,
        )  # fmt: skip
    else:
        _pack_tile(
            g_ptr, mg_ptr, pg_ptr, index_ptr, filled_ptr, carry, seed, tile - tiles_of_x, M, K, P,
            g_row, g_col, mg_row, ROWS, COLUMNS, SIGNED, WIDE,
        )  # fmt: skip


def pack_rows(
    memory: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    g: Tensor,
    indices: Tensor,
    carry: float | Tensor,
    seed: int | Tensor,
    *,
    signed: bool = False,
) -> PackedRows:
    """The selected rows with their memory, which is only read.

    Args:
        memory: `(mx, mg, filled)` as in `score.accumulate_and_score`.
        x: [M, N], float16, bfloat16 or float32, any strides.
        g: [M, P], same dtype, any strides.
        indices: [K] integers, contiguous. Rows named from M on become zero.
        carry: c, or a tensor of one element.
        seed: Or int64 [1] on the device; the same as for the update of the other rows.
        signed: Draw σ = ±1 for every row; 1 otherwise.

    Returns:
        [K, N] and [K, P] in the dtype of `x`.
    """
    (mx, mg, filled), (rows, n), p, k = memory, x.shape, g.shape[1], indices.numel()
    packed = PackedRows(x.new_empty((k, n)), g.new_empty((k, p)))
    largest = max(*x.stride(), *g.stride(), mx.stride(0), mg.stride(0))
    launch.launch(
        pack_kernel,
        (triton.cdiv(k, ROWS), triton.cdiv(n, COLUMNS) + triton.cdiv(p, COLUMNS)),
        x_ptr=x, g_ptr=g, mx_ptr=mx, mg_ptr=mg, px_ptr=packed.x, pg_ptr=packed.g,
        index_ptr=indices, filled_ptr=filled.view(torch.int8), carry=carry, seed=seed,
        M=rows, K=k, N=n, P=p, x_row=x.stride(0), x_col=x.stride(1), g_row=g.stride(0),
        g_col=g.stride(1), mx_row=mx.stride(0), mg_row=mg.stride(0),
        ROWS=ROWS, COLUMNS=COLUMNS, SIGNED=signed,
        WIDE=max(rows, n, p) * largest >= 1 << 31,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return packed
