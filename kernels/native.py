"""Calls into the C code beside this file, which `native_build` compiles on first use.

Every function returns `None` when it does not apply (no compiler, another system, a dtype or layout
that the C code does not take); `cpu.py` then does the same in plain PyTorch.

`MEMAOP_TRITON_BACKEND=torch` leaves all of this out, `MEMAOP_TRITON_CACHE_DIR` moves the cache.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memaop_triton.kernels import backend, native_build

_log = logging.getLogger(__name__)

_LANES = 16
# Where its GEMM was measured to be as fast as PyTorch's, so that the gather comes for nothing.
_GEMM_CAPABILITIES = ("AVX2",)
# A thread keeps this much room for panels between calls; asking for it anew costs page faults.
_MOST_KEPT = 32 << 20
_MOST_RANK = 1024
# Every thread sums into a product of its own: 4 million numbers of these at the most.
_MOST_PARTS = 1 << 22


class _Kind(NamedTuple):
    """A dtype of rows as the C code names it, and the dtype that it computes with."""

    suffix: str
    number: torch.dtype

    def function(self, library: ctypes.CDLL, name: str) -> Any:
        return getattr(library, f"{name}_{self.suffix}")


_KINDS = {
    torch.float32: _Kind("f32", torch.float32),
    torch.float64: _Kind("f64", torch.float64),
    torch.bfloat16: _Kind("bf16", torch.float32),
}
#: Dtypes of rows that the C code takes.
DTYPES = tuple(_KINDS)


def row_norms(a: Tensor) -> Tensor | None:
    """Euclidean norm of every row of `a` ([M, N]), or `None` if this does not apply."""
    library = _library_for(a)
    if library is None:
        return None
    kind = _KINDS[a.dtype]
    norms = torch.empty(a.shape[0], dtype=kind.number, device=a.device)
    kind.function(library, "row_norms")(*_matrix(a), norms.data_ptr(), *_size(a))
    return norms


def accumulate_and_score(memory: Tensor, rows: Tensor, carry: Tensor) -> Tensor | None:
    """`memory` ← carry·memory + rows in place; the norms of its rows, or `None` (nothing done)."""
    same = memory.dtype == rows.dtype and memory.shape == rows.shape
    library = _library_for(memory, rows, carry) if same else None
    if library is None or carry.dtype != _KINDS[memory.dtype].number:
        return None
    norms = torch.empty_like(carry)
    pointers = carry.data_ptr(), norms.data_ptr()
    accumulate = _KINDS[memory.dtype].function(library, "accumulate")
    accumulate(*_matrix(memory), *_matrix(rows), *pointers, *_size(memory))
    return norms


def project(x: Tensor, basis: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """Z = X Q ([M, q]) and √(‖x‖² − scale²‖z‖²) of the rows ([M]) for Q [N, q], or `None`.

    Z is in the dtype of `x`, which is that of Q too; the norms are in `score_dtype` of it, and take
    Z as it was before it was rounded to that dtype.
    """
    groups = -(-basis.shape[1] // _LANES)
    wanted = x.dtype == basis.dtype and groups in range(1, 5) and x.shape[1] % _LANES == 0
    library = _library_for(x) if wanted else None
    if library is None:
        return None
    kind = _KINDS[x.dtype]
    padded = x.new_zeros((x.shape[1], groups * _LANES), dtype=kind.number)
    padded[:, : basis.shape[1]] = basis  # of any layout: QR leaves it transposed
    z = x.new_empty((x.shape[0], groups * _LANES), dtype=kind.number)
    norms = x.new_empty(x.shape[0], dtype=kind.number)
    *size, threads = _size(x)
    kind.function(library, "project")(
        *(*_matrix(x), padded.data_ptr(), z.data_ptr(), norms.data_ptr()),
        *(scale, *size, groups, threads),
    )
    return z[:, : basis.shape[1]].to(x.dtype), norms


def transposed_mm(
    z: Tensor, a: Tensor, norms: Tensor | None = None, sums: Tensor | None = None
) -> Tensor | None:
    """Zᵀ A ([q, N]) for z [M, q] and a [M, N], or `None` and nothing done.

    Fills `norms` ([M], in `score_dtype` like the product) with |a_i| and `sums` ([N], in the dtype
    of `a`) with the sum of the rows of `a`.
    """
    wanted = z.dtype == a.dtype and z.shape[1] in range(4, 65, 4) and a.shape[1] % _LANES == 0
    library = _library_for(z, a) if wanted else None
    if library is None:
        return None
    kind = _KINDS[a.dtype]
    z = z.to(kind.number).contiguous()
    rank, columns = z.shape[1], a.shape[1]
    *size, threads = _size(a, most_threads=max(1, _MOST_PARTS // max(1, rank * columns)))
    product = a.new_empty((rank, columns), dtype=kind.number)
    exact_sums = None if sums is None else sums.to(kind.number)
    room = _room_for(kind, kind.function(library, "product_room")(rank, columns, threads))
    kind.function(library, "transposed_product")(
        *(*_matrix(z), rank, *_matrix(a), product.data_ptr(), room.data_ptr()),
        *(None if out is None else out.data_ptr() for out in (norms, exact_sums)),
        *(*size, threads),
    )
    if sums is not None and exact_sums is not None:
        sums.copy_(exact_sums)
    return product


def priority(scores: Tensor, draws: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """Priority sampling: `k` rows, ascending, and their weights; or `None`.

    Args:
        scores: [M] float32, non-negative; NaN counts as infinity.
        draws: [M] float32 in (0, 1].
        k: From 1 to M − 1.
    """
    wanted = scores.dtype == draws.dtype == torch.float32 and scores.shape == draws.shape
    library = _library_for(scores, draws) if wanted else None
    if library is None:
        return None
    weights = scores.new_empty(k)
    indices = _choose(library.priority, k, scores, draws, results=[weights])
    return indices, weights


def largest(scores: Tensor, k: int) -> Tensor | None:
    """The `k` rows with the largest scores ([M] float32), ascending, or `None`; NaN is infinity.

    Of rows with equal scores the first ones are taken. `k` is from 1 to M − 1.
    """
    library = _library_for(scores) if scores.dtype == torch.float32 else None
    return None if library is None else _choose(library.largest, k, scores)


def _choose(function: Any, k: int, *scores: Tensor, results: Sequence[Tensor] = ()) -> Tensor:
    keys = torch.empty_like(scores[0], dtype=torch.int32)
    indices = scores[0].new_empty(k, dtype=torch.int64)
    given = (a.data_ptr() for a in (*scores, keys))
    function(*given, keys.numel(), k, *(a.data_ptr() for a in (indices, *results)))
    return indices


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
    # A result smaller than a tile is no work for a GEMM.
    wanted = x.dtype == g.dtype and min(x.shape[1], g.shape[1]) >= _LANES
    rank = 0 if projection is None else projection[1].shape[1]
    library = None
    if wanted and rank <= _MOST_RANK and prefers_own_gemm():
        others = [] if weights is None else [weights]
        others += [] if projection is None else projection[1:]
        library = _library_for(x, g, *others)
    if library is None:
        return None
    kind = _KINDS[x.dtype]
    (rows, n), p, k = x.shape, g.shape[1], indices.numel()
    out = x.new_empty((n, p) if transposed else (p, n), dtype=kind.number)
    if k + rank == 0:
        return out.zero_().to(x.dtype)
    indices = indices.contiguous()
    weights = None if weights is None else weights.to(kind.number).contiguous()
    inside: tuple[int | None, ...] = (None, 0, None, 0, None)
    if projection is not None:
        expand, z, zg = projection
        # Rows a power of two apart would share a few places of the cache.
        by_row = out.new_empty((rank, n + _LANES))[:, :n].copy_(expand.t())
        z, zg = (a.to(kind.number).contiguous() for a in (z, zg))
        inside = (*_matrix(z), *_matrix(by_row), zg.data_ptr())
    threads = min(torch.get_num_threads(), 1 + (k + rank) * n * p // 200_000)
    panels = _room_for(kind, kind.function(library, "panel_size")(n, p, threads))
    failed = kind.function(library, "gather_gemm")(
        *(*_matrix(x), *_matrix(g), indices.data_ptr()),
        *(None if weights is None else weights.data_ptr(), *inside),
        *(out.data_ptr(), panels.data_ptr(), rows, k, n, p, rank, transposed, threads),
    )
    if failed:
        raise IndexError(f"indices must be in [0, {rows}), the rows of x.")
    return out.to(x.dtype)


_kept = threading.local()


def _room_for(kind: _Kind, numbers: int) -> Tensor:
    """Room for these from a multiple of 64 bytes on, until the thread that asks asks again."""
    count = numbers * kind.number.itemsize
    room: Tensor | None = getattr(_kept, "room", None)
    if room is None or room.numel() < count + 64:
        room = torch.empty(count + 64, dtype=torch.uint8, device="cpu")
        if count <= _MOST_KEPT:
            _kept.room = room
    return room[-room.data_ptr() % 64 :]


def is_compiled() -> bool:
    """Whether the compiled row passes are used on this machine (compiles them on first use)."""
    return _library() is not None


def prefers_own_gemm() -> bool:
    """Whether rows are multiplied by `gather_gemm.c` here, and not by PyTorch."""
    return torch.backends.cpu.get_cpu_capability() in _GEMM_CAPABILITIES


def obstacle() -> str:
    """Why the C code is not used on this machine; "" if it is.

    Compiles it if that has not been done yet.

    Raises:
        ValueError: `MEMAOP_TRITON_BACKEND` holds none of its values.
    """
    if backend.chosen() == "torch":
        return "MEMAOP_TRITON_BACKEND='torch' leaves them out"
    try:
        native_build.load()
    except (native_build.BuildError, OSError) as error:
        return str(error)
    return ""


def _library_for(*operands: Tensor) -> ctypes.CDLL | None:
    return _library() if all(map(_is_plain, operands)) else None


def _is_plain(a: Tensor) -> bool:
    """Whether a pointer and a row stride are all there is to know about `a`."""
    if type(a) not in (Tensor, torch.nn.Parameter) or a.layout != torch.strided or not a.is_cpu:
        return False
    if a.dtype not in _KINDS or a.stride(-1) != 1 or a.is_neg():
        return False
    try:
        return a.numel() == 0 or a.data_ptr() != 0
    except RuntimeError:  # a wrapper of torch.func
        return False


def _matrix(a: Tensor) -> tuple[int, int]:
    """Its address, and from one row to the next."""
    return a.data_ptr(), a.stride(0)


def _size(a: Tensor, most_threads: int = 1 << 30) -> tuple[int, int, int]:
    """Rows, columns, and the number of threads to use."""
    # A thread is not worth its share of less than a few thousand numbers.
    rows, columns = a.shape
    return rows, columns, min(torch.get_num_threads(), 1 + rows * columns // 16384, most_threads)


def _library() -> ctypes.CDLL | None:
    return None if backend.chosen() == "torch" else _compiled()


@functools.cache
def _compiled() -> ctypes.CDLL | None:
    try:
        return native_build.load()
    except (native_build.BuildError, OSError) as error:
        _log.info("row passes run in plain PyTorch: %s", error)
        return None
