"""Passes of the C code over maps, [B, C, *sizes], whose rows are positions.

As in `native`, every function returns `None` where the C code does not take its operands.
"""

from __future__ import annotations

import math

from torch import Tensor

from memaop_triton.kernels.cpu.library import code_for, threads_for

#: Columns of a basis, at most.
MAX_RANK = 64
_RANK_STEP = 4


def position_norms(a: Tensor) -> Tensor | None:
    """Norms over the channels of every position, [B L] for a [B, C, L], or `None`."""
    code = code_for(a) if a.is_contiguous() else None
    if code is None:
        return None
    samples, channels, positions = a.shape
    norms = a.new_empty(samples * positions, dtype=code.number)
    threads = min(samples, threads_for(samples * channels, positions))
    pointers = a.data_ptr(), norms.data_ptr()
    code.call("position_norms", *pointers, samples, channels, positions, threads)
    return norms


def gather_positions(a: Tensor, indices: Tensor) -> Tensor | None:
    """The channels of some positions, [K, C] for a [B, C, L], or `None`.

    Args:
        a: [B, C, L].
        indices: Sample times L plus position, [K] int64, in [0, B L).
    """
    code = code_for(a) if a.is_contiguous() else None
    if code is None:
        return None
    (_, channels, positions), k = a.shape, len(indices)
    out, indices = a.new_empty((k, channels)), indices.contiguous()
    pointers = a.data_ptr(), indices.data_ptr(), out.data_ptr()
    code.call("gather_positions", *pointers, channels, positions, k, threads_for(k, channels))
    return out


def project_positions(a: Tensor, basis: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """`native.project` of the positions: Z [B L, q] and [B L] norms, for a [B, C, L], or `None`.

    Args:
        a: [B, C, L].
        basis: [C, q] in the dtype of `a`.
        scale: As there.
    """
    rank = basis.shape[1]
    wanted = a.is_contiguous() and a.dtype == basis.dtype and rank in range(1, MAX_RANK + 1)
    code = code_for(a) if wanted else None
    if code is None:
        return None
    samples, channels, positions = a.shape
    columns = -(-rank // _RANK_STEP) * _RANK_STEP
    padded = a.new_zeros((channels, columns), dtype=code.number)
    padded[:, :rank] = basis
    z = a.new_empty((samples * positions, columns), dtype=code.number)
    norms = z.new_empty(len(z))
    pointers = a.data_ptr(), padded.data_ptr(), z.data_ptr(), norms.data_ptr()
    threads = threads_for(samples * positions, channels)
    code.call("project_positions", *pointers, scale, samples, channels, positions, columns, threads)
    return z[:, :rank].to(a.dtype), norms


def lay_out(a: Tensor, padding: tuple[int, ...], groups: int = 1) -> tuple[Tensor, Tensor] | None:
    """Maps position after position, and the squared norms of their channels, or `None`.

    Args:
        a: [B, C, *sizes], contiguous or with the channels last, of one to three sizes.
        padding: Zeros at either end of each of these.
        groups: Of channels, each with a norm of its own.

    Returns:
        [B, *padded, C], and [B, *padded, groups] in `score_dtype`.
    """
    batch, channels, *sizes = a.shape
    by_position = a.movedim(1, -1)
    is_last = by_position.is_contiguous()
    code = code_for(by_position if is_last else a) if is_last or a.is_contiguous() else None
    if code is None or len(sizes) > 3:
        return None
    padded = [size + 2 * pad for size, pad in zip(sizes, padding, strict=True)]
    out = a.new_empty((batch, *padded, channels))
    squares = a.new_empty((batch, *padded, groups), dtype=code.number)
    if not any(padding):
        sizes, padding = [math.prod(sizes)], (0,)
    missing = 3 - len(sizes)
    space = *(1,) * missing, *sizes, *(0,) * missing, *padding
    threads = threads_for(batch * math.prod(padded), channels)
    pointers = a.data_ptr(), out.data_ptr(), squares.data_ptr()
    code.call("lay_out", *pointers, is_last, batch, channels, *space, groups, threads)
    return out, squares
