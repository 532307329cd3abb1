"""The one place Triton kernels are launched from: whatever wants to see launches looks here.

`launch` takes a kernel's arguments by name and lets Triton find, or compile, the program for them:
some 20 µs on the host. A function that does nothing on the device but launch kernels can be
recorded once (`record`); its `Recording` launches the same programs on other tensors, 4 µs each.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime import driver

# Passed explicitly, because Triton 3.9 asks for it.
OPTIONS = {"enable_fp_fusion": True}

_ALIGNMENT = 256  # of a temporary, in bytes
_local = threading.local()  # `recorder`: the one that the thread's launches are noted by, if any


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    **arguments: Any,
) -> None:
    """Run `kernel` over `grid` on the device of the first tensor among its arguments.

    Args:
        kernel: A `triton.jit` function.
        grid: Number of programs along each axis; nothing happens if one is 0.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
        arguments: The kernel's arguments by name. `None` for a pointer that a flag says is not
            used.
    """
    if 0 in grid:
        return
    with _on(next(a.device for a in arguments.values() if isinstance(a, Tensor))):
        program = kernel[grid](num_warps=num_warps, num_stages=num_stages, **OPTIONS, **arguments)
    if is_recording():
        _local.recorder.note(kernel, program, grid, arguments)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a device the current one, if it is not."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


class _Repeated(NamedTuple):
    """A launch in a recording.

    Attributes:
        program: As Triton compiled it.
        run: What launches it, after grid and stream.
        handles: What that takes first: the function on the device, and its metadata.
        grid: Number of programs along each of three axes.
        arguments: All of them, numbers where the addresses and scalars of a call go.
        addresses: Of the argument at a place, the region that it lies in, and where in it.
        scalars: Of the argument at a place, which of the call's scalars it is.
    """

    program: Any
    run: Callable[..., None]
    handles: tuple[Any, ...]
    grid: tuple[int, int, int]
    arguments: list[Any]
    addresses: list[tuple[int, int, int]]
    scalars: list[tuple[int, int]]


class Recording:
    """The launches of one call of a function, for calls on other tensors like those.

    Regions of memory are numbered: first the call's tensors, then its results, last what it used in
    between, of which one allocation holds all.
    """

    def __init__(
        self,
        launches: list[_Repeated],
        results: list[tuple[tuple[int, ...], torch.dtype] | None],
        temporary: int,
        device: torch.device,
    ) -> None:
        self._launches = launches
        self._results = results
        self._temporary = temporary
        self._device = device

    def __call__(self, tensors: tuple[Tensor, ...], scalars: tuple[Any, ...]) -> list[Any]:
        """The results, from tensors and scalars in the order in which `record` took them."""
        with _on(self._device):
            return self._launch(tensors, scalars)

    def _launch(self, tensors: tuple[Tensor, ...], scalars: tuple[Any, ...]) -> list[Any]:
        device = self._device
        starts = [a.data_ptr() for a in tensors]
        results: list[Tensor | None] = []
        for made in self._results:
            if made is None:
                results.append(None)
            else:
                result = torch.empty(made[0], dtype=made[1], device=device)
                starts.append(result.data_ptr())
                results.append(result)
        between = torch.empty(self._temporary, dtype=torch.uint8, device=device)
        starts.append(between.data_ptr())
        active = driver.active
        stream = active.get_current_stream(active.get_current_device())
        is_watched = bool(knobs.runtime.launch_enter_hook.calls)  # by a profiler
        for program, run, handles, grid, template, addresses, places in self._launches:
            arguments = template.copy()
            for place, region, offset in addresses:
                arguments[place] = starts[region] + offset
            for place, which in places:
                arguments[place] = scalars[which]
            if is_watched:
                program[grid](*arguments, stream=stream)
            else:
                run(*grid, stream, *handles, *arguments)
        return results


def record(
    function: Callable[[], tuple[Tensor | None, ...]],
    tensors: tuple[Tensor, ...],
    scalars: tuple[tuple[str, Any], ...],
) -> tuple[tuple[Tensor | None, ...], Recording | None]:
    """Call `function`, and record its launches if it did nothing else on the device.

    Args:
        function: Takes its operands from its closure; returns tensors that it made.
        tensors: The operands that another call would take in their place, contiguous or not, of the
            same shapes, strides and alignment to 16 bytes.
        scalars: What differs in another call: the name of the kernels' argument, and its value now,
            by which arguments of one name are told apart.

    Returns:
        The results, and the recording: `None` if the calls cannot be repeated, because an operator
        of PyTorch computed something, memory was used that is neither an operand nor made in the
        call, or the kernels are not compiled ones.
    """
    recorder = _Recorder(tensors, scalars)
    _local.recorder = recorder
    try:
        with _Operators(recorder):
            results = function()
    finally:
        _local.recorder = None
    return results, recorder.recording(results)


def is_recording() -> bool:
    """Whether a `record` of this thread is under way."""
    return getattr(_local, "recorder", None) is not None


class _Recorder:
    def __init__(self, tensors: tuple[Tensor, ...], scalars: tuple[tuple[str, Any], ...]) -> None:
        self.is_repeatable = True
        self._tensors = tensors
        self._scalars = scalars
        self._varying = {name for name, _ in scalars}
        self._noted: list[tuple[Any, Any, tuple[int, ...], dict[str, Any]]] = []

    def note(self, kernel: Any, program: Any, grid: tuple[int, ...], named: dict[str, Any]) -> None:
        """Take down a launch; the tensors stay alive, so that no address is used twice."""
        if not hasattr(program, "packed_metadata"):  # the interpreter runs a function
            self.is_repeatable = False
        self._noted.append((kernel, program, grid, named))

    def recording(self, results: tuple[Tensor | None, ...]) -> Recording | None:
        """What was noted, if that was all."""
        made = [a for a in results if a is not None]
        if not self.is_repeatable or not self._noted or not all(a.is_contiguous() for a in made):
            return None
        known = {a.data_ptr(): i for i, a in enumerate((*self._tensors, *made))}
        if len(known) < len(self._tensors) + len(made):
            return None  # two of them share their memory
        ours: dict[int, list[int]] = {}  # regions that lie in a storage
        starts = [*known]
        for region, a in enumerate((*self._tensors, *made)):
            ours.setdefault(_storage(a), []).append(region)
        last, size = len(known), 0
        between: dict[int, int] = {}  # a temporary's place, by the address of its storage
        launches = []
        for kernel, program, grid, named in self._noted:
            arguments, addresses, scalars = [], [], []
            for place, name in enumerate(kernel.arg_names):
                value = named[name]
                if isinstance(value, Tensor):
                    address = value.data_ptr()
                    start = _storage(value)
                    if address in known:
                        addresses.append((place, known[address], 0))
                    elif start in ours:  # a part of a region
                        if len(ours[start]) > 1:
                            return None
                        (region,) = ours[start]
                        addresses.append((place, region, address - starts[region]))
                    else:
                        if start not in between:
                            between[start] = size
                            size += -(-value.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
                        addresses.append((place, last, between[start] + address - start))
                    value = 0
                elif name in self._varying:
                    if (name, value) not in self._scalars:
                        return None
                    scalars.append((place, self._scalars.index((name, value))))
                elif value is not None and not isinstance(value, (int, float, str)):
                    return None
                arguments.append(value)
            x, y, z = (*grid, 1, 1)[:3]
            # Without metadata and hooks of a profiler.
            handles = (program.function, program.packed_metadata, None, None, None)
            launches.append(
                _Repeated(program, program.run, handles, (x, y, z), arguments, addresses, scalars)
            )
        shapes = [None if a is None else (tuple(a.shape), a.dtype) for a in results]
        return Recording(launches, shapes, size, self._tensors[0].device)


def _storage(a: Tensor) -> int:
    return a.untyped_storage().data_ptr()


class _Operators(TorchDispatchMode):
    """Notices operators that do more than make room or a view."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket not in _ROOM:
            self._recorder.is_repeatable = False
        return func(*args, **(kwargs or {}))


_ROOM = (
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
)
