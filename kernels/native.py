"""`rows.c`, `selection.c` and `gather_gemm.c`, compiled on first use where a C compiler is at hand.

Every function returns `None` when it does not apply (no compiler, another system, a dtype or layout
that the C code does not take); `cpu.py` then does the same in plain PyTorch. The compiled file
stays in the cache directory, under a name that says what it was made from and for.

`MEMAOP_TRITON_BACKEND=torch` leaves all of this out, `MEMAOP_TRITON_CACHE_DIR` moves the cache.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import Tensor

from memaop_triton.kernels import backend

_log = logging.getLogger(__name__)

_HEADER = Path(__file__).with_name("lanes.h")
_SOURCES = tuple(_HEADER.with_name(f"{name}.c") for name in ("rows", "selection", "gather_gemm"))
_LANES = 16
# Where its GEMM was measured to be as fast as PyTorch's, so that the gather comes for nothing.
_GEMM_CAPABILITIES = ("AVX2",)
# A thread keeps this much room for panels between calls; asking for it anew costs page faults.
_MOST_KEPT = 32 << 20
_MOST_RANK = 1024
# Every thread sums into a product of its own: 16 MiB of these at the most.
_MOST_PARTS = 1 << 22
_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}
# Not -march=native: a cache directory may be shared by machines of different make.
_VECTOR_FLAGS = {
    "AVX512": [
        *("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"),
        "-mprefer-vector-width=512",
    ],
    "AVX2": ["-mavx2", "-mfma"],
}
_FLAGS = ["-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-Wno-psabi"]


class BuildError(RuntimeError):
    """Why the row passes are not compiled here."""


def row_norms(a: Tensor) -> Tensor | None:
    """Euclidean norm of every row of `a` ([M, N]), or `None` if this does not apply."""
    library = _library_for(a)
    if library is None:
        return None
    norms = torch.empty(a.shape[0], dtype=a.dtype, device=a.device)
    function = getattr(library, f"row_norms_{_SUFFIX[a.dtype]}")
    function(*_matrix(a), _pointer(norms), *_size(a))
    return norms


def accumulate_and_score(memory: Tensor, rows: Tensor, carry: Tensor) -> Tensor | None:
    """`memory` ← carry·memory + rows in place; the norms of its rows, or `None` (nothing done)."""
    same = memory.dtype == rows.dtype == carry.dtype and memory.shape == rows.shape
    library = _library_for(memory, rows, carry) if same else None
    if library is None:
        return None
    norms = torch.empty_like(carry)
    function = getattr(library, f"accumulate_{_SUFFIX[memory.dtype]}")
    function(*_matrix(memory), *_matrix(rows), _pointer(carry), _pointer(norms), *_size(memory))
    return norms


def project(x: Tensor, basis: Tensor) -> tuple[Tensor, Tensor] | None:
    """Z = X Q ([M, q]) and the row norms of X ([M]) for basis Q ([N, q]), or `None`."""
    groups = -(-basis.shape[1] // _LANES)
    wanted = x.dtype == basis.dtype == torch.float32 and groups in range(1, 5)
    if not wanted or x.shape[1] % _LANES:
        return None
    padded = x.new_zeros((x.shape[1], groups * _LANES))
    padded[:, : basis.shape[1]] = basis  # of any layout: QR leaves it transposed
    library = _library_for(x, padded)
    if library is None:
        return None
    z = x.new_empty((x.shape[0], groups * _LANES))
    norms = x.new_empty(x.shape[0])
    *size, threads = _size(x)
    library.project(
        *_matrix(x), _pointer(padded), _pointer(z), _pointer(norms), *size, groups, threads
    )
    return z[:, : basis.shape[1]], norms


def transposed_mm(z: Tensor, a: Tensor, norms: Tensor | None = None) -> Tensor | None:
    """Zᵀ A ([q, N]) for z [M, q] and a [M, N], or `None`; fills `norms` ([M]) with |a_i|."""
    wanted = z.dtype == a.dtype == torch.float32 and z.shape[1] in range(4, 65, 4)
    library = _library_for(z, a) if wanted and a.shape[1] % _LANES == 0 else None
    if library is None:
        return None
    rank, columns = z.shape[1], a.shape[1]
    *size, threads = _size(a, most_threads=max(1, _MOST_PARTS // (rank * columns)))
    parts = a.new_zeros((threads.value, rank, library.row_of_sums(ctypes.c_long(columns))))
    library.transposed_product(
        *_matrix(z),
        ctypes.c_long(rank),
        *_matrix(a),
        _pointer(parts),
        _pointer(_room_for(4 * threads.value * library.strip_size())),
        None if norms is None else _pointer(norms),
        *size,
        threads,
    )
    return parts[..., :columns].sum(0)


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
    indices = torch.empty(k, dtype=torch.int64)
    sizes = ctypes.c_long(keys.numel()), ctypes.c_long(k)
    function(*map(_pointer, (*scores, keys)), *sizes, *map(_pointer, (indices, *results)))
    return indices


def gather_gemm(
    x: Tensor,
    g: Tensor,
    indices: Tensor,
    weights: Tensor | None = None,
    projection: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor | None:
    """Σ_k w_k g[i_k]ᵀ x[i_k] ([P, N]), or `None`; arguments and projection as in `cpu.gather_gemm`.

    Raises:
        IndexError: An index is not in [0, M).
    """
    given = [x, g] if weights is None else [x, g, weights]
    rank = 0
    if projection is not None:
        expand, z, zg = projection
        rank = z.shape[1]
        # Rows a power of two apart would share a few places of the cache.
        by_row = x.new_empty((expand.shape[1], expand.shape[0] + _LANES))[:, : expand.shape[0]]
        by_row.copy_(expand.t())
        given += [by_row, z, zg]
    wanted = torch.backends.cpu.get_cpu_capability() in _GEMM_CAPABILITIES and all(
        a.dtype == torch.float32 for a in given
    )
    # A result smaller than a tile is no work for a GEMM.
    wanted = wanted and min(x.shape[1], g.shape[1]) >= _LANES and rank <= _MOST_RANK
    library = _library_for(*given) if wanted else None
    if library is None:
        return None
    (rows, n), p, k = x.shape, g.shape[1], indices.numel()
    out = x.new_empty((p, n))
    nothing = ctypes.c_void_p()
    inside = (nothing, ctypes.c_long(), nothing, ctypes.c_long(), nothing)
    if projection is not None:
        inside = (*_matrix(z), *_matrix(by_row), _pointer(zg.contiguous()))
    if k + rank == 0:
        return out.zero_()
    sizes = map(ctypes.c_long, (rows, k, n, p, rank))
    threads = min(torch.get_num_threads(), 1 + (k + rank) * n * p // 200_000)
    panels = _room_for(4 * library.panel_size(ctypes.c_long(n), ctypes.c_long(p)))
    failed = library.gather_gemm(
        *(*_matrix(x), *_matrix(g), _pointer(indices.contiguous())),
        *(nothing if weights is None else _pointer(weights.contiguous()), *inside),
        *(_pointer(out), _pointer(panels), *sizes, ctypes.c_int(threads)),
    )
    if failed:
        raise IndexError(f"indices must be in [0, {rows}), the rows of x.")
    return out


_kept = threading.local()


def _room_for(count: int) -> Tensor:
    """`count` bytes from a multiple of 64 on, until the thread that asks asks again."""
    room: Tensor | None = getattr(_kept, "room", None)
    if room is None or room.numel() < count + 64:
        room = torch.empty(count + 64, dtype=torch.uint8, device="cpu")
        if count <= _MOST_KEPT:
            _kept.room = room
    return room[-room.data_ptr() % 64 :]


def is_compiled() -> bool:
    """Whether the compiled row passes are used on this machine (compiles them on first use)."""
    return _library() is not None


def _library_for(*operands: Tensor) -> ctypes.CDLL | None:
    return _library() if all(map(_is_plain, operands)) else None


def _is_plain(a: Tensor) -> bool:
    """Whether a pointer and a row stride are all there is to know about `a`."""
    if type(a) not in (Tensor, torch.nn.Parameter) or a.layout != torch.strided:
        return False
    if a.device.type != "cpu" or a.dtype not in _SUFFIX or a.stride(-1) != 1 or a.is_neg():
        return False
    try:
        return a.numel() == 0 or a.data_ptr() != 0
    except RuntimeError:  # a wrapper of torch.func
        return False


def _pointer(a: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(a.data_ptr())


def _matrix(a: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_long]:
    return _pointer(a), ctypes.c_long(a.stride(0))


def _size(
    a: Tensor, most_threads: int = 1 << 30
) -> tuple[ctypes.c_long, ctypes.c_long, ctypes.c_int]:
    """Rows, columns, and the number of threads to use."""
    # A thread is not worth its share of less than a few thousand numbers.
    threads = min(torch.get_num_threads(), 1 + a.numel() // 16384, most_threads)
    return ctypes.c_long(a.shape[0]), ctypes.c_long(a.shape[1]), ctypes.c_int(threads)


def _library() -> ctypes.CDLL | None:
    return None if backend.chosen() == "torch" else _compiled()


@functools.cache
def _compiled() -> ctypes.CDLL | None:
    try:
        return _load()
    except (BuildError, OSError) as error:
        _log.info("row passes run in plain PyTorch: %s", error)
        return None


def _load() -> ctypes.CDLL:
    # PyTorch's own OpenMP runtime serves the parallel loops, and so its threads: the file is not
    # linked against another one.
    if sys.platform != "linux":
        raise BuildError(f"not done on {sys.platform}")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise BuildError("no C compiler: none of $CC, cc, gcc is there")
    flags = _FLAGS + _VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])
    version = _run([*compiler.split(), "--version"])
    texts = [source.read_text() for source in (_HEADER, *_SOURCES)]
    made_from = "\0".join([*texts, version, platform.machine(), *flags])
    name = f"rows-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    cached = _cache_folder() / name
    try:
        return _open(cached)
    except OSError as error:
        _log.info("compiling the row passes: %s", error)
    with tempfile.TemporaryDirectory() as folder:
        compiled = _compile(compiler, flags, Path(folder))
        try:
            _put(compiled, cached)
            return _open(cached)
        except OSError as error:
            _log.info("compiled row passes are not kept in %s: %s", cached.parent, error)
        return _open(compiled)


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for function in (library.panel_size, library.row_of_sums, library.strip_size):
        function.restype = ctypes.c_long
    return library


def _cache_folder() -> Path:
    chosen = os.environ.get("MEMAOP_TRITON_CACHE_DIR")
    return (Path(chosen) if chosen else platformdirs.user_cache_path("memaop-triton")) / "native"


def _compile(compiler: str, flags: list[str], folder: Path) -> Path:
    objects = [folder / f"{source.stem}.o" for source in _SOURCES]
    for source, made in zip(_SOURCES, objects, strict=True):
        _run([*compiler.split(), *flags, "-c", str(source), "-o", str(made)])
    linked = folder / "rows.so"
    _run([*compiler.split(), "-shared", *map(str, objects), "-o", str(linked), "-lm"])
    return linked


def _put(source: Path, target: Path) -> None:
    """Copy to `target` in one step, so that a process beside this one never loads half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        part = shutil.copy(source, folder)
        os.replace(part, target)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{command[0]} failed: {error.stderr.strip()[-500:]}") from error
    except (FileNotFoundError, PermissionError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    return done.stdout
