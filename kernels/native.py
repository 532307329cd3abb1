"""The row passes of `rows.c`, compiled on first use where a C compiler is at hand.

Every function returns `None` when it does not apply (no compiler, another system, a dtype or layout
that `rows.c` does not take); `cpu.py` then does the same in plain PyTorch. The compiled file stays
in the cache directory, under a name that says what it was made from and for.

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
from pathlib import Path

import torch
from torch import Tensor

from memaop_triton.kernels import backend
from memaop_triton.kernels.cache_folder import cache_folder

_log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("rows.c")
_LANES = 16
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
    # Rows a power of two apart would share a few places of the cache.
    parts = a.new_zeros((threads.value, rank, columns + _LANES))
    library.transposed_product(
        *_matrix(z),
        ctypes.c_long(rank),
        *_matrix(a),
        _pointer(parts),
        ctypes.c_long(parts.stride(1)),
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
    keys = torch.empty_like(scores, dtype=torch.int32)
    indices, weights = scores.new_empty(k, dtype=torch.int64), scores.new_empty(k)
    sizes = ctypes.c_long(scores.numel()), ctypes.c_long(k)
    results = _pointer(indices), _pointer(weights)
    library.priority(_pointer(scores), _pointer(draws), _pointer(keys), *sizes, *results)
    return indices, weights


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
    made_from = "\0".join([_SOURCE.read_text(), version, platform.machine(), *flags])
    name = f"rows-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    cached = cache_folder("native") / name
    try:
        return ctypes.CDLL(str(cached))
    except OSError as error:
        _log.info("compiling the row passes: %s", error)
    with tempfile.TemporaryDirectory() as folder:
        compiled = _compile(compiler, flags, Path(folder))
        try:
            _put(compiled, cached)
            return ctypes.CDLL(str(cached))
        except OSError as error:
            _log.info("compiled row passes are not kept in %s: %s", cached.parent, error)
        return ctypes.CDLL(str(compiled))


def _compile(compiler: str, flags: list[str], folder: Path) -> Path:
    made, linked = folder / "rows.o", folder / "rows.so"
    _run([*compiler.split(), *flags, "-c", str(_SOURCE), "-o", str(made)])
    _run([*compiler.split(), "-shared", str(made), "-o", str(linked), "-lm"])
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
