"""The compiled C code: which tensors it takes, its number of threads, and its work memory.

`MEMAOP_TRITON_BACKEND=torch` switches the C code off; `MEMAOP_TRITON_CACHE_DIR` names the folder in
which `build` keeps it.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memaop_triton.kernels import env
from memaop_triton.kernels.cpu import build, processor

_log = logging.getLogger(__name__)

#: Columns in a group; PyTorch computes narrower rows.
LANES = 16
# Bytes that a thread keeps for panels between calls: new memory costs page faults.
_MOST_KEPT = 32 << 20
# Every thread sums into its own product: at most 4 million numbers in all of them.
_MOST_PARTS = 1 << 22
# Waking a thread and waiting for it takes a few microseconds on an idle machine, and a time slice
# of the scheduler if another process uses its core. So a thread gets at least about 50 µs of work:
# this many numbers of a pass over rows, or multiplications of a product.
_NUMBERS_OF_A_THREAD = 1 << 17
_MULTIPLICATIONS_OF_A_THREAD = 1 << 21


# How the C code names a dtype of rows, and the dtype that it computes with.
_KINDS = {
    torch.float32: ("f32", torch.float32),
    torch.float64: ("f64", torch.float64),
    torch.bfloat16: ("bf16", torch.float32),
}
#: Dtypes of rows that the C code takes.
DTYPES = tuple(_KINDS)

_kept = threading.local()


class Code(NamedTuple):
    """The compiled functions for rows of one dtype, and the dtype that they compute with."""

    library: ctypes.CDLL
    suffix: str
    number: torch.dtype

    def call(self, name: str, *arguments: Any) -> Any:
        """Call the function of this name."""
        return getattr(self.library, f"{name}_{self.suffix}")(*arguments)


def room_for(number: torch.dtype, count: int) -> Tensor:
    """Work memory aligned to 64 bytes, valid until the same thread calls this again."""
    count *= number.itemsize
    room: Tensor | None = getattr(_kept, "room", None)
    if room is None or room.numel() < count + 64:
        room = torch.empty(count + 64, dtype=torch.uint8, device="cpu")
        if count <= _MOST_KEPT:
            _kept.room = room
    return room[-room.data_ptr() % 64 :]


def is_compiled() -> bool:
    """Whether the compiled row passes are used on this machine (compiles them on first use)."""
    return _library() is not None


def prefers_own_gemm(dtype: torch.dtype) -> bool:
    """Whether rows are multiplied by `gather_gemm.c` here, and not by PyTorch.

    True where it was measured to be at least as fast. On AVX2 both products take the same time, and
    ours needs no separate gather. On processors of other vendors than Intel, MKL does not use
    512-bit registers: there a call takes 0.5 to 0.7 of the time. For bfloat16, PyTorch uses
    instructions that AVX-512 itself does not have.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512":
        return dtype != torch.bfloat16 and processor.vendor() not in ("GenuineIntel", "")
    return capability == "AVX2"


def obstacle() -> str:
    """Why the C code is not used on this machine; "" if it is.

    Compiles it if that has not been done yet.

    Raises:
        ValueError: `MEMAOP_TRITON_BACKEND` holds none of its values.
    """
    if env.backend() == "torch":
        return "MEMAOP_TRITON_BACKEND='torch' leaves them out"
    found = _compiled()
    return found if isinstance(found, str) else ""


def code_for(*operands: Tensor) -> Code | None:
    """The code for the dtype of the first; `None` if there is none or it does not take these."""
    library = _library() if all(map(is_plain, operands)) else None
    return None if library is None else Code(library, *_KINDS[operands[0].dtype])


def is_plain(a: Tensor) -> bool:
    """Whether a pointer and a row stride describe `a` completely."""
    if type(a) not in (Tensor, torch.nn.Parameter) or a.layout != torch.strided or not a.is_cpu:
        return False
    if a.dtype not in _KINDS or a.stride(-1) != 1 or a.is_neg():
        return False
    try:
        return a.numel() == 0 or a.data_ptr() != 0
    except RuntimeError:  # a wrapper of torch.func
        return False


def address(a: Tensor | None) -> int | None:
    """Where the numbers of `a` are; a null pointer for `None`."""
    return None if a is None else a.data_ptr()


def matrix(a: Tensor) -> tuple[int, int]:
    """Address and row stride."""
    return a.data_ptr(), a.stride(0)


def apart(a: Tensor, number: torch.dtype) -> Tensor:
    """A copy whose rows are no power of two apart: these would compete for few sets of a cache."""
    rows, columns = a.shape
    return a.new_empty((rows, columns + LANES), dtype=number)[:, :columns].copy_(a)


def sizes_of(a: Tensor, rank: int = 0) -> tuple[int, int, int]:
    """Rows, columns, and the number of threads to use, where each holds `rank` sums a column."""
    rows, columns = a.shape
    return rows, columns, threads_for(rows, columns, rank)


def threads_for(rows: int, columns: int, rank: int = 0) -> int:
    """The number of threads for a pass over so many numbers, as in `sizes_of`."""
    most = max(1, _MOST_PARTS // max(1, rank * columns))
    worth = 1 + rows * columns // _NUMBERS_OF_A_THREAD
    return min(torch.get_num_threads(), worth, most)


def gemm_threads(rows: int, n: int, p: int) -> int:
    """Threads that share a product of this many outer products of vectors of these lengths."""
    return min(torch.get_num_threads(), 1 + rows * n * p // _MULTIPLICATIONS_OF_A_THREAD)


def _library() -> ctypes.CDLL | None:
    found = "" if env.backend() == "torch" else _compiled()
    return None if isinstance(found, str) else found


@functools.cache
def _compiled() -> ctypes.CDLL | str:
    """The code, or why it is not compiled here."""
    try:
        return build.load()
    except (build.BuildError, OSError) as error:
        _log.info("row passes run in plain PyTorch: %s", error)
        return str(error)
