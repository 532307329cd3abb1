"""What several kernels are made of: tiles, row offsets, random numbers.

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
def _rank_columns(
    matrix_ptr, tile, count, rank, pitch,
    BLOCK: tl.constexpr, RANK: tl.constexpr, SIDEWAYS: tl.constexpr,
):  # fmt: skip
    """A tile of lines of [count, rank], `pitch` apart: [BLOCK, RANK], or its transpose SIDEWAYS."""
    line = tile * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, RANK)
    starts = matrix_ptr + line.to(tl.int64) * pitch
    if SIDEWAYS:
        places = starts[None, :] + r[:, None]
        inside = (line < count)[None, :] & (r < rank)[:, None]
    else:
        places = starts[:, None] + r[None, :]
        inside = (line < count)[:, None] & (r < rank)[None, :]
    return tl.load(places, mask=inside, other=0)


@triton.jit
def first_value(
    c_ptr, q_ptr, q_scale, scale_ptr, tile_p, tile_n, split, rank, q_row, P, N,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, RANK: tl.constexpr, Q_OF_G: tl.constexpr,
    PRECISION: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """What a tile's sum starts from: its part of s·C Qᵀ in the first split, zero elsewhere.

    C is [P, rank] in float32, Q is [N, rank] in the operands' dtype, its rows q_row apart. With
    Q_OF_G it is s·Q Cᵀ, of C [N, rank] and Q [P, rank].
    """
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if RANK > 0 and split == 0:
        if Q_OF_G:
            c = _rank_columns(c_ptr, tile_n, N, rank, rank, BLOCK_N, RANK, True)
            q = _rank_columns(q_ptr, tile_p, P, rank, q_row, BLOCK_P, RANK, False)
        else:
            c = _rank_columns(c_ptr, tile_p, P, rank, rank, BLOCK_P, RANK, False)
            q = _rank_columns(q_ptr, tile_n, N, rank, q_row, BLOCK_N, RANK, True)
        if SCALED:
            c = c / tl.load(scale_ptr)
        if q.dtype == tl.float32:
            if Q_OF_G:
                acc = tl.dot(q, c, acc, input_precision=PRECISION)
            else:
                acc = tl.dot(c, q, acc, input_precision=PRECISION)
        else:
            # Two summands of the operands' dtype carry C nearly exactly.
            upper = c.to(q.dtype)
            lower = (c - upper.to(tl.float32)).to(q.dtype)
            if Q_OF_G:
                acc = tl.dot(q, lower, tl.dot(q, upper, acc))
            else:
                acc = tl.dot(lower, q, tl.dot(upper, q, acc))
        acc *= q_scale
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


@triton.jit
def value_of(argument):
    """A number that is passed by value or, as the address of a tensor of one element, by place.

    What changes from step to step is passed by value, which takes no operation on the device,
    except in a CUDA graph, which would repeat the value.
    """
    if isinstance(argument, float):  # a value, as the interpreter hands it over
        return argument
    return tl.load(argument) if argument.dtype.is_ptr() else argument


@triton.jit
def row_signs(seed, rows):
    """±1 (float32) for each row number in `rows`."""
    bits, _, _, _ = tl.randint4x(value_of(seed), rows)
    return tl.where(bits & 1 == 0, 1.0, -1.0)


@triton.jit
def mix(bits):
    """A hash of uint32: two rounds of xor-shift and odd multiplication.

    Every input bit reaches the upper half.
    """
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def row_keys(seed, rows, STREAM: tl.constexpr):
    """Random uint32 for each row number; `STREAM` is 0 or 1, for two matrices with one seed."""
    _, first, second, _ = tl.randint4x(value_of(seed), rows)
    keys = first if STREAM == 0 else second
    return keys.to(tl.uint32)


@triton.jit
def round_to_bfloat16(value, keys, columns):
    """Round float32 `value` ([BLOCK_M, BLOCK_C]) up or down to bfloat16, with mean `value`.

    `keys` are those of the rows. The chance of rounding up is the discarded fraction, in steps of
    2⁻¹⁶. NaN and infinities keep their kind.
    """
    noise = mix(keys[:, None] + columns.to(tl.uint32)[None, :] * 0x9E3779B1)
    bits = value.to(tl.uint32, bitcast=True)
    rounded = ((bits + (noise >> 16)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(value) < float("inf"), rounded, value).to(tl.bfloat16)
