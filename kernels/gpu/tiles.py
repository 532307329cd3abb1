"""What the GEMMs are made of: which tile a program owns, how rows are reached, how a sum is stored.

A program owns a BLOCK_P × BLOCK_N tile of dW ([P, N]) and one share of the selected rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memaop_triton.kernels.env import allows_tf32
from memaop_triton.kernels.targets import Target


def precision(target: Target, dtype: torch.dtype) -> str:
    """How products of this dtype are formed: "tf32" for float32 where torch allows it."""
    return "tf32" if dtype == torch.float32 and target.has_tf32 and allows_tf32() else "ieee"


def is_aligned(*operands: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes and its columns lie side by side.

    Only then can copies be 16 bytes wide, and a tensor-copy descriptor describe the matrix.
    """
    return all(
        a.stride(1) == 1
        and a.data_ptr() % 16 == 0
        and a.stride(0) * a.element_size() % 16 == 0
        and a.stride(0) >= a.shape[1]
        for a in operands
    )


@triton.jit
def tile_of_program(N, P, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, GROUP: tl.constexpr):
    """Tile numbers along P and N, in an order that shares rows of tiles in the second-level cache.

    GROUP tiles along P times all along N are a band; programs go down a band's columns.
    """
    program = tl.program_id(0)
    tiles_p = tl.cdiv(P, BLOCK_P)
    band = GROUP * tl.cdiv(N, BLOCK_N)
    first = program // band * GROUP
    height = tl.minimum(tiles_p - first, GROUP)
    return first + program % band % height, program % band // height


@triton.jit
def wrapped(tile, count, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Column numbers of a tile; those beyond `count` start again at 0."""
    columns = (tile * BLOCK + tl.arange(0, BLOCK)) % count
    if EVEN:
        columns = tl.max_contiguous(tl.multiple_of(columns, 16), 16)
    return columns


@triton.jit
def row_offsets(rows, stride, WIDE: tl.constexpr):
    """Row number times stride; both fit 32 bits, the product needs 64 if WIDE."""
    if WIDE:
        offsets = rows.to(tl.uint32).to(tl.uint64) * tl.cast(tl.cast(stride, tl.uint32), tl.uint64)
    else:
        offsets = rows.to(tl.int32) * stride
    return offsets


@triton.jit
def gathered(start, offsets, COLUMNS_FIRST: tl.constexpr):
    """The tile [BLOCK, BLOCK_K] of one operand: columns at `start`, rows at `offsets` from there.

    COLUMNS_FIRST says in which orientation it is loaded, not what is returned.
    """
    if COLUMNS_FIRST:
        return tl.load(start[:, None] + offsets[None, :])
    return tl.load(start[None, :] + offsets[:, None]).T


@triton.jit
def weighted(g, w):
    """g·w in the dtype of g; w is of that dtype or, for bfloat16, float32.

    AMD's vector units have no bfloat16 product, and rounding to it by the letter takes some fifteen
    instructions. Half a unit in the last place, added to the bits, takes one.
    """
    if g.dtype == w.dtype:
        product = g * w
    else:
        bits = (g.to(tl.float32) * w).to(tl.uint32, bitcast=True) + 0x8000
        product = (bits >> 16).to(tl.uint16).to(g.dtype, bitcast=True)
    return product


@triton.jit
def first_value(
    c_ptr, e_ptr, scale_ptr, tile_p, tile_n, split, rank, P, N,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """What a tile's sum starts from: its part of C Eᵀ in the first split, zero elsewhere.

    C is [P, rank] in float32, E is [N, rank] in the operands' dtype.
    """
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if RANK > 0 and split == 0:
        r = tl.arange(0, RANK)
        p = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        in_rank = r < rank
        c_places = c_ptr + p[:, None] * rank + r[None, :]
        c = tl.load(c_places, mask=(p < P)[:, None] & in_rank[None, :], other=0)
        e_places = e_ptr + n[None, :] * rank + r[:, None]
        e = tl.load(e_places, mask=(n < N)[None, :] & in_rank[:, None], other=0)
        if SCALED:
            c = c / tl.load(scale_ptr)
        if e.dtype == tl.float32:
            acc = tl.dot(c, e, acc, input_precision=PRECISION)
        else:
            # Two summands of the operands' dtype carry C nearly exactly.
            upper = c.to(e.dtype)
            lower = (c - upper.to(tl.float32)).to(e.dtype)
            acc = tl.dot(lower, e, tl.dot(upper, e, acc))
    return acc


@triton.jit
def store_tile(
    acc, scale_ptr, out_ptr, tile_p, tile_n, split, P, N,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SCALED: tl.constexpr, ACCUMULATE: tl.constexpr,
    ATOMIC: tl.constexpr,
):  # fmt: skip
    """Store a tile into part `split` of the contiguous [parts, P, N] at `out_ptr`.

    With ATOMIC there is one part, and the tile is added to it.
    """
    if SCALED:
        acc *= tl.load(scale_ptr)
    columns_p = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
    columns_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (columns_p[:, None] < P) & (columns_n[None, :] < N)
    line = columns_p.to(tl.int64)
    if not ATOMIC:
        line += split.to(tl.int64) * P
    places = out_ptr + line[:, None] * N + columns_n[None, :]
    if ATOMIC:
        tl.atomic_add(places, acc, mask=inside, sem="relaxed")
    else:
        if ACCUMULATE:
            acc += tl.load(places, mask=inside, other=0).to(tl.float32)
        tl.store(places, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def share_of_split(steps, SPLIT_K: tl.constexpr):
    """First and end of the steps that this program's split takes."""
    split = tl.program_id(1)
    return steps * split // SPLIT_K, steps * (split + 1) // SPLIT_K
