"""Kernels run by Triton's interpreter inside an ordinary process, and the bytes they move.

Setting TRITON_INTERPRET changes every kernel of a process for good, and has to be set before they
are imported. `interpreted` does the same for a while only, so that one run of pytest can
interpret a kernel in one test and compile it in the next.
"""

import contextlib
import inspect
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

# Stands for a function that sees all of the language by both of its names.
_EVERY_MODULE = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})


class Launch(NamedTuple):
    """What one launch moved: distinct bytes, by the first parameter that has the memory."""

    kernel: str
    read: dict[str, int]
    written: dict[str, int]

    @property
    def moved(self):
        return sum(self.read.values()) + sum(self.written.values())


class OutOfBoundsError(Exception):
    """A kernel touched memory that belongs to none of its arguments."""


@contextlib.contextmanager
def interpreted():
    """Until the end, compiled kernels run in the interpreter, on tensors of the CPU."""
    scope = interpreter._patch_lang(_EVERY_MODULE)

    def run(kernel, *args, **kwargs):
        return _interpretable(kernel).run(*args, **kwargs)

    def call(function, *args, **kwargs):
        return _interpretable(function)(*args, **kwargs)

    def bind(function, owner, kind=None):
        return partial(function, owner) if isinstance(owner, tl.tensor) else function

    try:
        with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
            # Patched above for all functions: what it patches for one of them it never undoes.
            patch.setattr(interpreter, "_patch_lang", lambda _: interpreter._LangPatchScope())
            patch.setattr(JITFunction, "run", run)
            patch.setattr(JITFunction, "__call__", call)
            # Methods of `tl.tensor`, as in `x.sum(0)`.
            patch.setattr(JITFunction, "__get__", bind, raising=False)
            # Triton 3.6 converts an array of one element, which numpy refuses from 2.4 on.
            patch.setattr(tl.tensor, "__index__", lambda value: int(value.handle.data.item()))
            yield
    finally:
        scope.restore()


@contextlib.contextmanager
def counted():
    """Until the end, record every interpreted launch, and refuse accesses out of bounds."""
    launches = []
    execute = interpreter.GridExecutor.__call__

    def counting(executor, *args, **kwargs):
        # Without num_warps and the like, which are no parameters of the kernel.
        known = {name: value for name, value in kwargs.items() if name in executor.arg_names}
        meter = _Meter(executor.fn.__name__, inspect.getcallargs(executor.fn, *args, **known))
        with pytest.MonkeyPatch.context() as patch_launch:
            memory = _Memory(interpreter._interpreter, meter)
            patch_launch.setattr(interpreter, "_interpreter", memory)
            execute(executor, *args, **kwargs)
        launches.append(meter.launch())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", counting)
        yield launches


def _interpretable(kernel):
    if not hasattr(kernel, "_interpreted"):
        kernel._interpreted = InterpretedFunction(kernel.fn)
    return kernel._interpreted


class _Meter:
    """Marks the bytes of a launch's tensors that were touched."""

    def __init__(self, kernel, given):
        self.kernel = kernel
        self.buffers = {}  # address, bytes read and bytes written by parameter
        for name, value in given.items():
            self._add(name, value)

    def _add(self, name, value):
        if isinstance(value, tuple):
            for i, item in enumerate(value):
                self._add(f"{name}.{i}", item)
            return
        tensor = getattr(value, "base", value)  # of a TensorDescriptor
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            marks = np.zeros((2, storage.nbytes()), dtype=bool)
            self.buffers[name] = (storage.data_ptr(), *marks)

    def mark(self, pointers, mask, size, kind):
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

    def launch(self):
        """Parameters that were never touched are left out."""
        read = {name: int(marks.sum()) for name, (_, marks, _) in self.buffers.items()}
        written = {name: int(marks.sum()) for name, (_, _, marks) in self.buffers.items()}
        touched = [{n: size for n, size in sizes.items() if size} for sizes in (read, written)]
        return Launch(self.kernel, *touched)


class _Memory:
    """The interpreter's ways to memory, each marked first; no kernel has atomic updates."""

    def __init__(self, real, meter):
        self._real, self._mark = real, meter.mark

    def load(self, pointers, mask, other, dtype):
        self._mark(pointers, mask, np.dtype(dtype).itemsize, 0)
        return self._real.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        self._mark(pointers, mask, value.dtype.itemsize, 1)
        return self._real.store(pointers, value, mask)
