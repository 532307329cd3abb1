"""The one place Triton kernels are launched from: whatever wants to see launches looks here.

`launch` takes a kernel's arguments by name and lets Triton find, or compile, the program for them:
some 20 µs on the host. A function that does nothing on the device but launch kernels can be
recorded once (`record`); its `Recording` launches the same programs on other tensors, 4 µs each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

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
    return contextlib.nullcontext() if _is_current(device) else torch.cuda.device(device)


def _is_current(device: torch.device) -> bool:
    return device.type != "cuda" or device.index == torch.cuda.current_device()


_FIRST_ARGUMENT = 9  # after the grid, the stream, two handles and what a profiler would take


class _Repeated(NamedTuple):
    """A launch in a recording.

    Attributes:
        program: As Triton compiled it.
        run: What launches it.
        pick: Takes the arguments of `run` out of the values of a call.
    """

    program: Any
    run: Callable[..., None]
    pick: Callable[[list[Any]], tuple[Any, ...]]


class Recording:
    """The launches of one call of a function, for calls on other tensors like those.

    Regions of memory are numbered: first the call's tensors, then its results, last what it used in
    between, of which one allocation holds all. The values of a call, out of which each launch picks
    its arguments, are the stream, addresses, the call's scalars, descriptors of its tensors, and
    what never changes.
    """

    def __init__(
        self,
        launches: list[_Repeated],
        addresses: list[tuple[int, int]],
        descriptors: list[tuple[int, dict[str, Any]]],
        constants: list[Any],
        results: list[tuple[tuple[int, ...], torch.dtype] | None],
        temporary: int,
        device: torch.device,
    ) -> None:
        self._launches = launches
        self._addresses = addresses  # regions, and where in them
        self._descriptors = descriptors  # regions of tensors, and how they are divided into tiles
        self._constants = constants
        self._results = results
        self._temporary = temporary
        self._device = device

    def __call__(self, tensors: tuple[Tensor, ...], scalars: list[Any]) -> list[Any]:
        """The results, from tensors and scalars in the order in which `record` took them."""
        if _is_current(self._device):
            return self._launch(tensors, scalars)
        with torch.cuda.device(self._device):
            return self._launch(tensors, scalars)

    def _launch(self, tensors: tuple[Tensor, ...], scalars: list[Any]) -> list[Any]:
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
        addresses = [starts[region] + offset for region, offset in self._addresses]
        described = [TensorDescriptor(tensors[i], **tiles) for i, tiles in self._descriptors]
        values = [stream, *addresses, *scalars, *described, *self._constants]
        if knobs.runtime.launch_enter_hook.calls:  # watched by a profiler
            for program, _, pick in self._launches:
                arguments = pick(values)
                program[arguments[:3]](*arguments[_FIRST_ARGUMENT:], stream=stream)
        else:
            for _, run, pick in self._launches:
                run(*pick(values))
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
        regions = (*self._tensors, *made)
        if len({a.data_ptr() for a in regions}) < len(regions):
            return None  # two of them share their memory
        values = _Values(regions)
        launches = []
        for kernel, program, grid, named in self._noted:
            places = [values.constant(n) for n in (*grid, 1, 1)[:3]]
            places.append(_STREAM)
            handles = (program.function, program.packed_metadata, None, None, None)
            places.extend(values.constant(handle) for handle in handles)
            for name in kernel.arg_names:
                value = named[name]
                if isinstance(value, Tensor):
                    place = values.address(value)
                elif name in self._varying:
                    varies = (name, value) in self._scalars
                    place = (_SCALAR, self._scalars.index((name, value))) if varies else None
                elif isinstance(value, TensorDescriptor):
                    place = values.descriptor(value, len(self._tensors))
                else:
                    is_fixed = value is None or isinstance(value, (int, float, str))
                    place = values.constant(value) if is_fixed else None
                if place is None:
                    return None
                places.append(place)
            launches.append((program, places))
        first = {_STREAM[0]: 0, _ADDRESS: 1}
        first[_SCALAR] = 1 + len(values.addresses)
        first[_DESCRIPTOR] = first[_SCALAR] + len(self._scalars)
        first[_CONSTANT] = first[_DESCRIPTOR] + len(values.descriptors)
        repeated = [
            _Repeated(program, program.run, itemgetter(*(first[kind] + i for kind, i in places)))
            for program, places in launches
        ]
        shapes = [None if a is None else (tuple(a.shape), a.dtype) for a in results]
        device = self._tensors[0].device
        held = values.addresses, values.descriptors, values.constants
        return Recording(repeated, *held, shapes, values.temporary, device)


# Kinds of values in a recording, each with a number of its own within its kind.
_ADDRESS, _SCALAR, _DESCRIPTOR, _CONSTANT = "address", "scalar", "descriptor", "constant"
_STREAM = ("stream", 0)
_Place = tuple[str, int]


class _Values:
    """What the arguments of recorded launches are taken from, while they are taken down.

    Args:
        regions: The tensors and results of the call.
    """

    def __init__(self, regions: tuple[Tensor, ...]) -> None:
        self.addresses: list[tuple[int, int]] = []
        self.descriptors: list[tuple[int, dict[str, Any]]] = []
        self.constants: list[Any] = []
        self.temporary = 0  # bytes
        self._regions = {a.data_ptr(): number for number, a in enumerate(regions)}
        self._starts = [*self._regions]
        self._within: dict[int, list[int]] = {}  # the regions in a storage
        for number, a in enumerate(regions):
            self._within.setdefault(_storage(a), []).append(number)
        self._between: dict[int, int] = {}  # the place of a storage among what lies in between

    def constant(self, value: Any) -> _Place:
        """The place of a value that stays as it is."""
        self.constants.append(value)
        return _CONSTANT, len(self.constants) - 1

    def descriptor(self, described: TensorDescriptor, tensors: int) -> _Place | None:
        """The place of a descriptor; `None` unless it is of one of the call's tensors as it is.

        Of the regions, the first `tensors` are these.
        """
        region = self._regions.get(described.base.data_ptr(), tensors)
        if region >= tensors:
            return None
        fields = [field.name for field in dataclasses.fields(described)]
        tiles = {name: getattr(described, name) for name in fields if name != "base"}
        self.descriptors.append((region, tiles))
        return _DESCRIPTOR, len(self.descriptors) - 1

    def address(self, a: Tensor) -> _Place | None:
        """The place of a tensor's address; `None` if it is not known which region it is in."""
        address, storage = a.data_ptr(), _storage(a)
        if address in self._regions:
            found = self._regions[address], 0
        elif storage in self._within:  # a part of a region
            if len(self._within[storage]) > 1:
                return None
            (region,) = self._within[storage]
            found = region, address - self._starts[region]
        else:
            if storage not in self._between:
                self._between[storage] = self.temporary
                size = a.untyped_storage().nbytes()
                self.temporary += -(-size // _ALIGNMENT) * _ALIGNMENT
            found = len(self._starts), self._between[storage] + address - storage
        if found not in self.addresses:
            self.addresses.append(found)
        return _ADDRESS, self.addresses.index(found)


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
