"""Rows in 4 or 8 bits a number: how they are rounded, and restored.

A row is cut into blocks of `BLOCK` columns, and what these leave into blocks of smaller powers of
two. A block x is multiplied with the orthonormal Hadamard matrix H of its width, which spreads an
outlier over all numbers, and divided by a scale s such that none is above 2ᵇ⁻¹ − 1 for b bits. The
rest is subtractive dither (Roberts 1962; Schuchman 1964), with u uniform on (0, 1):

    stored = ⌊x H / s + u⌋        restored = s (stored + ½ − u) H

The error is uniform, has mean zero and does not depend on x. Its variance s²/12 is half that of
rounding to one of two neighbours at random. u is a function of a seed and the place of a number, so
it is not stored: Philox 4x32-10 gives a block 32 words, which hold 16 bits for each column, those
of the block's first half in their lower halves.

The scale is a bfloat16 that was rounded up before the division. Where rows lie near a subspace with
basis Q, what Q leaves of them is stored, and their products with Q are kept beside: the rounding
shrinks with what is stored.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from memaop_triton.kernels.cpu.library import address, apart, code_for, matrix, threads_for
from memaop_triton.kernels.cpu.torch_ops import score_dtype
from memaop_triton.kernels.draws import draw_seed_tensor

#: Columns of the widest blocks.
BLOCK = 64
# Below, the reciprocal of a scale has no finite value.
_LEAST_SCALE = 2.0**-120
_CHUNK_NUMBERS = 1 << 20
_WORD = 0xFFFFFFFF


class RoundedRows(NamedTuple):
    """Rows as they are stored.

    Attributes:
        numbers: [M, bytes_of_row], uint8: signed numbers of 8 bits, or two of 4 bits, plus 8, in a
            byte: the first half of a block's in the lower bits.
        scales: [M, blocks], bfloat16; NaN for a block with a number that is not finite.
        norms: Of the rows as they will be restored, without what is kept beside, [M], in
            `score_dtype`; NaN where a scale is.
        seed: What u follows from, [1], int64.
    """

    numbers: Tensor
    scales: Tensor
    norms: Tensor
    seed: Tensor


class Inside(NamedTuple):
    """The part of rows inside of a subspace, which is kept beside them: Z E.

    Attributes:
        z: [M, q].
        expand: E, [q, N], the transpose of a multiple of an orthonormal basis.
    """

    z: Tensor
    expand: Tensor


@functools.cache
def widths(columns: int) -> tuple[int, ...]:
    """The widths of a row's blocks."""
    narrow = (1 << bit for bit in reversed(range(BLOCK.bit_length() - 1)))
    return (BLOCK,) * (columns // BLOCK) + tuple(w for w in narrow if columns % BLOCK & w)


@functools.cache
def bytes_of_row(columns: int, bits: int) -> int:
    """Bytes that the numbers of a row take."""
    return sum(-(-width * bits // 8) for width in widths(columns))


def round_rows(
    x: Tensor,
    bits: int,
    inside: Inside | None = None,
    generator: torch.Generator | None = None,
) -> RoundedRows:
    """`x`, less what is inside of a subspace, in `bits` bits a number.

    Args:
        x: [M, N], floating point. A number that is not finite makes its block NaN, as do numbers
            beyond the range of float32.
        bits: 4 or 8.
        inside: What is not to be stored.
        generator: Source of the draws; the device's default one if `None`.
    """
    rows, columns = x.shape
    stored = RoundedRows(
        x.new_empty((rows, bytes_of_row(columns, bits)), dtype=torch.uint8),
        x.new_empty((rows, len(widths(columns))), dtype=torch.bfloat16),
        x.new_empty(rows, dtype=score_dtype(x.dtype)),
        draw_seed_tensor(x.device, generator),
    )
    code = code_for(x)
    if code is not None:
        plain = _plain(inside, code.number)
        code.call(
            "stash_rows",
            *(*matrix(x), *_arguments(plain), *(a.data_ptr() for a in stored[:3])),
            *(int(stored.seed), rows, columns, bits, threads_for(rows, columns)),
        )
        return stored
    step = _chunk(columns)
    for first in range(0, rows, step):
        here = slice(first, first + step)
        chunk = x[here].to(stored.norms.dtype)
        if inside is not None:
            chunk = chunk.addmm(inside.z[here].to(chunk), inside.expand.to(chunk), alpha=-1)
        places = torch.arange(first, first + len(chunk), device=x.device)
        out = stored._replace(
            numbers=stored.numbers[here], scales=stored.scales[here], norms=stored.norms[here]
        )
        _round(chunk, bits, out, places)
    return stored


def restore_rows(
    stored: RoundedRows,
    bits: int,
    columns: int,
    dtype: torch.dtype,
    indices: Tensor | None = None,
    inside: Inside | None = None,
) -> Tensor:
    """The rows `indices`, or all: [K, N].

    Args:
        stored: What `round_rows` made of rows with this number of columns.
        bits: Of its numbers.
        columns: N.
        dtype: Of the result.
        indices: [K] int64, in [0, M).
        inside: What is added to the rows; of all of them, also if some are picked.
    """
    rows = len(stored.norms) if indices is None else len(indices)
    out = torch.empty((rows, columns), dtype=dtype, device=stored.norms.device)
    code = code_for(out)
    if code is not None:
        plain = _plain(inside, code.number)
        indices = None if indices is None else indices.contiguous()
        code.call(
            "restore_rows",
            *(stored.numbers.data_ptr(), stored.scales.data_ptr(), address(indices)),
            *(*_arguments(plain), *matrix(out), int(stored.seed), rows, columns, bits),
            threads_for(rows, columns),
        )
        return out
    number, step = score_dtype(dtype), _chunk(columns)
    if indices is None:
        indices = torch.arange(rows, device=out.device)
    for first in range(0, rows, step):
        here = slice(first, first + step)
        picked = indices[here]
        chunk = _restored(stored, picked, bits, columns, number)
        if inside is not None:
            chunk = chunk.addmm(inside.z[picked].to(number), inside.expand.to(number))
        out[here] = chunk
    return out


def _plain(inside: Inside | None, number: torch.dtype) -> Inside | None:
    """As the C code takes it, `None` if there is nothing inside. To be kept until it was read."""
    if inside is None or inside.z.shape[1] == 0:
        return None
    return Inside(inside.z.to(number).contiguous(), apart(inside.expand, number))


def _arguments(inside: Inside | None) -> tuple[int | None, ...]:
    """Addresses, row strides and rank."""
    if inside is None:
        return None, 0, None, 0, 0
    return *matrix(inside.z), *matrix(inside.expand), inside.z.shape[1]


def _round(x: Tensor, bits: int, out: RoundedRows, places: Tensor) -> None:
    """Round the rows `x` into `out`; they are those at `places` of all rows."""
    most = 2 ** (bits - 1) - 1
    squares = torch.zeros_like(out.norms)
    for part in _parts(x.shape[1], bits):
        blocks = x[:, part.columns].unflatten(1, (part.blocks, part.width))
        blocks = blocks @ _hadamard(part.width, x.dtype, x.device)
        scales = _scale_above(blocks.abs().amax(2) / most)
        step = scales.to(x.dtype).unsqueeze(2)
        dither = _dither(out.seed, places, part, x)
        steps = torch.floor(blocks / step + dither).clamp(max=most)
        squares += (step * (steps + 0.5 - dither)).square_().sum((1, 2))
        steps = steps.nan_to_num_(0.0)
        if bits == 8:
            numbers = steps.to(torch.int8).view(torch.uint8)
        else:
            numbers = (steps + 8).to(torch.uint8)
            half = -(-part.width // 2)
            low, high = numbers[:, :, :half], numbers[:, :, half:]
            numbers = low + (high << 4 if part.width > 1 else 8 << 4)
        out.numbers[:, part.bytes] = numbers.flatten(1)
        out.scales[:, part.scales] = scales
    torch.sqrt(squares, out=out.norms)


def _restored(
    stored: RoundedRows, places: Tensor, bits: int, columns: int, number: torch.dtype
) -> Tensor:
    numbers, scales = stored.numbers[places], stored.scales[places]
    out = torch.empty((len(numbers), columns), dtype=number, device=numbers.device)
    for part in _parts(columns, bits):
        packed = numbers[:, part.bytes].unflatten(1, (part.blocks, -1))
        if bits == 8:
            steps = packed.view(torch.int8).to(number)
        else:
            steps = torch.cat([packed & 15, packed >> 4], 2)[:, :, : part.width].to(number) - 8
        steps += 0.5 - _dither(stored.seed, places, part, out)
        steps *= scales[:, part.scales].to(number).unsqueeze(2)
        blocks = steps @ _hadamard(part.width, number, numbers.device)
        out[:, part.columns] = blocks.flatten(1)
    return out


def _dither(seed: Tensor, rows: Tensor, part: _Part, like: Tensor) -> Tensor:
    """u of some blocks of these rows, [rows, blocks, width] in the dtype of `like`."""
    blocks = torch.arange(part.scales.start, part.scales.stop, device=rows.device)
    places = rows.unsqueeze(1) * part.blocks_of_row + blocks
    counters = places.unsqueeze(2) * 8 + torch.arange(8, device=rows.device)
    words = torch.stack(_philox(seed, counters), 3).flatten(2)
    half = -(-part.width // 2)
    halves = torch.cat([words[:, :, :half] & 0xFFFF, words[:, :, :half] >> 16], 2)
    return (halves[:, :, : part.width].to(like.dtype) + 0.5) * 2.0**-16


def _philox(seed: Tensor, counters: Tensor) -> list[Tensor]:
    """Four words of Philox 4x32-10 for each of the counters (c, 0, 0, 0), as int64."""
    low_key, high_key = seed & _WORD, seed >> 32 & _WORD
    zeros = torch.zeros_like(counters)
    state = [counters & _WORD, zeros, zeros, zeros]
    for _ in range(10):
        # The product's 64 bits, whatever its sign is.
        even, odd = state[0] * 0xD2511F53, state[2] * 0xCD9E8D57
        state = [
            (odd >> 32 & _WORD) ^ state[1] ^ low_key,
            odd & _WORD,
            (even >> 32 & _WORD) ^ state[3] ^ high_key,
            even & _WORD,
        ]
        low_key, high_key = low_key + 0x9E3779B9 & _WORD, high_key + 0xBB67AE85 & _WORD
    return state


class _Part(NamedTuple):
    """Neighbouring blocks of one width: where their columns, numbers and scales are in a row."""

    width: int
    blocks: int
    blocks_of_row: int
    columns: slice
    bytes: slice
    scales: slice


@functools.cache
def _parts(columns: int, bits: int) -> tuple[_Part, ...]:
    parts = list[_Part]()
    column = byte = scale = 0
    for width, same in itertools.groupby(widths(columns)):
        count = len(list(same))
        ends = column + count * width, byte + count * -(-width * bits // 8), scale + count
        slices = (slice(*both) for both in zip((column, byte, scale), ends, strict=True))
        parts.append(_Part(width, count, len(widths(columns)), *slices))
        column, byte, scale = ends
    return tuple(parts)


def _scale_above(least: Tensor) -> Tensor:
    """Bfloat16 scales of at least `least` and at most a 128th more; NaN if it is not finite."""
    single = least.clamp(min=_LEAST_SCALE).float()
    single = torch.where(single < least, torch.nextafter(single, single + math.inf), single)
    rounded_up = ((single.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
    usable = least <= torch.finfo(torch.float32).max / 2
    return torch.where(usable, rounded_up, math.nan).to(torch.bfloat16)


@functools.lru_cache(maxsize=64)
def _hadamard(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The Hadamard matrix of `width` columns over its root."""
    matrix = torch.ones((1, 1), dtype=dtype, device=device)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(width)


def _chunk(columns: int) -> int:
    """Rows that are rounded or restored together."""
    return max(1, _CHUNK_NUMBERS // max(1, columns))
