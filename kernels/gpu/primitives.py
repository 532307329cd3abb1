"""What several kernels are made of: tiles, row offsets, sums of parts, random numbers.

A GEMM's program owns a BLOCK_P × BLOCK_N tile of dW ([P, N]) and one share of the selected rows.

Row and column numbers fit 32 bits. Their products with strides need not: every product that is
added to a pointer is computed in 64 bits, or in 32 where the launcher has checked the largest one.

Random numbers are functions of a seed and a place, without state or order: the same seed gives the
same numbers whatever the launch looks like, so that a step can be repeated bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memaop_triton.kernels.env import allows_tf32
from memaop_triton.kernels.gpu import launch
from memaop_triton.kernels.targets import Target


def precision(target: Target, dtype: torch.dtype) -> str:
    """The precision of products of this dtype: "tf32" for float32 where torch allows it."""
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
    """Row number times stride. A product that needs 64 bits is WIDE.

    Two unsigned numbers of 32 bits take one instruction, so a stride is only wider if it has to be.
    """
    if not WIDE:
        offsets = rows.to(tl.int32) * stride
    elif (tl.zeros((1,), tl.int32) + stride).dtype == tl.int64:
        offsets = rows.to(tl.int64) * stride
    else:
        offsets = rows.to(tl.uint32).to(tl.uint64) * tl.cast(tl.cast(stride, tl.uint32), tl.uint64)
    return offsets


@triton.jit
def gathered(start, offsets, wanted, COLUMNS_FIRST: tl.constexpr, MASKED: tl.constexpr):
    """The tile [BLOCK, BLOCK_K] of one operand: columns at `start`, rows at `offsets` from there.

    With MASKED the rows that are not `wanted` are zero and are not read. COLUMNS_FIRST says in
    which orientation the tile is loaded, not what is returned.
    """
    if COLUMNS_FIRST:
        places = start[:, None] + offsets[None, :]
        return tl.load(places, mask=wanted[None, :], other=0) if MASKED else tl.load(places)
    places = start[None, :] + offsets[:, None]
    return tl.load(places, mask=wanted[:, None], other=0).T if MASKED else tl.load(places).T


@triton.jit
def weighted(g, w):
    """g·w in the dtype of g; w is of that dtype or, for bfloat16, float32.

    AMD's vector units have no bfloat16 product, and exact rounding to it (ties to even, NaN) takes
    some fifteen instructions. Adding half a unit in the last place to the bits takes one.
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
        c_places = (c_ptr + p.to(tl.int64) * rank)[:, None] + r[None, :]
        c = tl.load(c_places, mask=(p < P)[:, None] & in_rank[None, :], other=0)
        e_places = (e_ptr + n.to(tl.int64) * rank)[None, :] + r[:, None]
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
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Store a tile into part `split` of the contiguous [parts, P, N] at `out_ptr`."""
    if SCALED:
        acc *= tl.load(scale_ptr)
    columns_p = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
    columns_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (columns_p[:, None] < P) & (columns_n[None, :] < N)
    line = columns_p.to(tl.int64) + split.to(tl.int64) * P
    places = out_ptr + line[:, None] * N + columns_n[None, :]
    tl.store(places, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def share_of_split(steps, SPLIT_K: tl.constexpr):
    """First and end of the steps that this program's split takes."""
    split = tl.program_id(1)
    return steps * split // SPLIT_K, steps * (split + 1) // SPLIT_K


@triton.jit(do_not_specialize=["parts", "minus"])
def sum_parts_kernel(
    parts_ptr, minus_ptr, out_ptr, parts, minus, count,
    BLOCK: tl.constexpr, SUBTRACT: tl.constexpr,
):  # fmt: skip
    """out = Σ parts, less Σ minus with SUBTRACT; always added in the same order."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    total = tl.zeros((BLOCK,), tl.float32)
    parts_ptr += places
    for _ in range(0, parts):
        total += tl.load(parts_ptr, mask=inside, other=0)
        parts_ptr += count
    if SUBTRACT:
        minus_ptr += places
        for _ in range(0, minus):
            total -= tl.load(minus_ptr, mask=inside, other=0)
            minus_ptr += count
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=inside)


def parts_of(out: Tensor, split: int) -> Tensor:
    """What `split` programs per tile store their sums into: `out` itself, or float32 parts."""
    if split == 1:
        return out
    return torch.empty((split, *out.shape), dtype=torch.float32, device=out.device)


def sum_parts(parts: Tensor, out: Tensor, *, minus: Tensor | None = None) -> Tensor:
    """`out` ← Σ `parts` − Σ `minus`, in one order, so that it repeats bit for bit.

    Args:
        parts: [S, ...] float32, contiguous.
        out: Shape of a part, contiguous, any floating dtype.
        minus: [T, ...] float32, contiguous.
    """
    block = 1024
    launch.launch(
        sum_parts_kernel,
        (triton.cdiv(out.numel(), block),),
        parts_ptr=parts,
        minus_ptr=minus,
        out_ptr=out,
        parts=parts.shape[0],
        minus=0 if minus is None else minus.shape[0],
        count=out.numel(),
        BLOCK=block,
        SUBTRACT=minus is not None,
        num_warps=4,
        num_stages=1,
    )
    return out


@triton.jit
def row_signs(seed_ptr, rows):
    """±1 (float32) for each row number in `rows`, from the seed (int64) at `seed_ptr`."""
    bits, _, _, _ = tl.randint4x(tl.load(seed_ptr), rows)
    return tl.where(bits & 1 == 0, 1.0, -1.0)


@triton.jit
def _mix(bits):
    # Two rounds of xor-shift and odd multiplication: every input bit reaches the upper half.
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def row_keys(seed_ptr, rows, STREAM: tl.constexpr):
    """Random uint32 for each row number; `STREAM` is 0 or 1, for two matrices with one seed."""
    _, first, second, _ = tl.randint4x(tl.load(seed_ptr), rows)
    keys = first if STREAM == 0 else second
    return keys.to(tl.uint32)


@triton.jit
def round_to_bfloat16(value, keys, columns):
    """Round float32 `value` ([BLOCK_M, BLOCK_C]) up or down to bfloat16, with mean `value`.

    `keys` are those of the rows. The chance of rounding up is the discarded fraction, in steps of
    2⁻¹⁶. NaN and infinities keep their kind.
    """
    noise = _mix(keys[:, None] + columns.to(tl.uint32)[None, :] * 0x9E3779B1)
    bits = value.to(tl.uint32, bitcast=True)
    rounded = ((bits + (noise >> 16)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(value) < float("inf"), rounded, value).to(tl.bfloat16)
