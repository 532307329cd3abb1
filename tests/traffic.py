"""Kernels run by Triton's interpreter inside an ordinary process, and the bytes they move.

Setting TRITON_INTERPRET changes every kernel of a process for good, and has to be set before they
are imported. `interpreted` does the same for a while only, so that one run of pytest can
interpret a kernel in one test and compile it in the next.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

Marks = np.ndarray[Any, np.dtype[np.bool_]]
Patch = Callable[[Any, str, Any], None]

# Stands for a function that sees all of the language by both of its names.
_EVERY_MODULE = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})


@dataclass
class Launch:
    """What one launch moved.

    Attributes:
        kernel: Name of the kernel.
        read: Distinct bytes loaded, by the first parameter that the memory was passed as.
        written: Distinct bytes stored, likewise.
    """

    kernel: str
    read: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)

    @property
    def moved(self) -> int:
        """All bytes, read and written."""
        return sum(self.read.values()) + sum(self.written.values())


class OutOfBoundsError(Exception):
    """A kernel touched memory that belongs to none of its arguments."""


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Until the end, compiled kernels run in the interpreter, on tensors of the CPU."""
    scope = interpreter._patch_lang(_EVERY_MODULE)

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return _interpretable(kernel).run(*args, grid=grid, warmup=warmup, **kwargs)

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        return _interpretable(function)(*args, **kwargs)

    def bind(function: Any, owner: Any, kind: Any = None) -> Any:
        return partial(function, owner) if isinstance(owner, tl.tensor) else function

    try:
        with _patches() as patch, np.errstate(all="ignore"):
            # Patched above for all functions: what it patches for one of them it never undoes.
            patch(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
            patch(JITFunction, "run", run)
            patch(JITFunction, "__call__", call)
            patch(JITFunction, "__get__", bind)  # methods of `tl.tensor`, as in `x.sum(0)`
            # Triton 3.6 converts an array of one element, which numpy refuses from 2.4 on.
            patch(tl.tensor, "__index__", lambda value: int(value.handle.data.item()))
            yield
    finally:
        scope.restore()


@contextlib.contextmanager
def counted() -> Iterator[list[Launch]]:
    """Until the end, record every interpreted launch, and refuse accesses out of bounds."""
    launches: list[Launch] = []
    execute = interpreter.GridExecutor.__call__
    with _patches() as patch:

        def counting(executor: Any, *args: Any, **kwargs: Any) -> None:
            given = inspect.getcallargs(executor.fn, *args, **_known(executor, kwargs))
            meter = _Meter(executor.fn.__name__, given)
            with _patches() as patch_launch:
                memory = _Memory(interpreter._interpreter, meter)
                patch_launch(interpreter, "_interpreter", memory)
                execute(executor, *args, **kwargs)
            launches.append(Launch(meter.kernel, *meter.totals()))

        patch(interpreter.GridExecutor, "__call__", counting)
        yield launches


@contextlib.contextmanager
def _patches() -> Iterator[Patch]:
    """Yields a `setattr` that is undone in the end."""
    missing = object()
    with contextlib.ExitStack() as undo:

        def patch(owner: Any, name: str, value: Any) -> None:
            before = vars(owner).get(name, missing)
            if before is missing:
                undo.callback(delattr, owner, name)
            else:
                undo.callback(setattr, owner, name, before)
            setattr(owner, name, value)

        yield patch


def _interpretable(kernel: Any) -> InterpretedFunction:
    if not hasattr(kernel, "_interpreted"):
        kernel._interpreted = InterpretedFunction(kernel.fn)
    return kernel._interpreted


def _known(executor: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without num_warps and the like, which are no parameters of the kernel."""
    return {name: value for name, value in kwargs.items() if name in executor.arg_names}


def _touched(sizes: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if size}


class _Meter:
    """Marks the bytes of a launch's tensors that were touched."""

    def __init__(self, kernel: str, given: dict[str, Any]) -> None:
        self.kernel = kernel
        self.buffers: dict[str, tuple[int, Marks, Marks]] = {}
        for name, value in given.items():
            self._add(name, value)

    def _add(self, name: str, value: Any) -> None:
        if isinstance(value, tuple):
            for i, item in enumerate(value):
                self._add(f"{name}.{i}", item)
            return
        tensor = getattr(value, "base", value)  # of a TensorDescriptor
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        marks = np.zeros((2, storage.nbytes()), dtype=bool)
        self.buffers[name] = (storage.data_ptr(), marks[0], marks[1])

    def mark(self, pointers: np.ndarray, mask: Any, size: int, kind: int) -> None:
        """Note an access of `size` bytes at each pointer under the mask; 0 reads, 1 writes."""
        live = np.broadcast_to(mask, pointers.shape)
        left = pointers[live].astype(np.int64)
        for start, *marks in self.buffers.values():
            offsets = left - start
            inside = (offsets >= 0) & (offsets + size <= marks[0].size)
            touched = (offsets[inside][:, None] + np.arange(size)).ravel()
            marks[kind][touched] = True
            left = left[~inside]
        if left.size:
            raise OutOfBoundsError(
                f"{self.kernel}: {left.size} elements are in none of its tensors"
            )

    def totals(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes read and bytes written, by parameter; parameters never touched are left out."""
        read = {name: int(marks.sum()) for name, (_, marks, _) in self.buffers.items()}
        written = {name: int(marks.sum()) for name, (_, _, marks) in self.buffers.items()}
        return _touched(read), _touched(written)


class _Memory:
    """The interpreter's ways to memory, each marked first; no kernel has atomic updates."""

    def __init__(self, real: Any, meter: _Meter) -> None:
        self._real, self._mark = real, meter.mark

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self._mark(pointers, mask, np.dtype(dtype).itemsize, 0)
        return self._real.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        self._mark(pointers, mask, value.dtype.itemsize, 1)
        return self._real.store(pointers, value, mask)
