"""What one layer's backward pass needs beside tensors, and how a compiled graph refers to it.

A graph is made of operators on tensors, and its inputs are guarded: a memory that grows with the
batch, a learning rate or a process group cannot be an argument without recompiling. So the
operators of `memaop_triton.nn.ops` take a *handle*, a tensor without elements whose shape is the
number of a `LayerState`. A graph passes it on without reading it, and identical blocks share one
graph.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from memaop_triton.backward.shards import ProcessShards
from memaop_triton.backward.step import Factors, Observer
from memaop_triton.config import MemAOPConfig
from memaop_triton.memory import kinds
from memaop_triton.memory.kinds import Memory

# Sizes that no other dimension of a graph is likely to have: it would unify the two.
_numbers = itertools.count(10_000_019)
_states: weakref.WeakValueDictionary[int, LayerState] = weakref.WeakValueDictionary()
# Configurations without a memory that `memaop_linear` is called with in turn, on each device.
_MAX_STATES_WITHOUT_MEMORY = 256
# Configurations that one memory is used with in turn.
_MAX_STATES_OF_A_MEMORY = 16


class Controller(Protocol):
    """Decides about the ratios of some layers, and sets their configurations.

    A copy goes on from the same decisions, for the copies of these layers.
    """

    def adopt(self, layer: nn.Module) -> None:
        """Take over a layer that was copied together with this copy of a controller."""
        ...

    def summary(self) -> str:
        """What is decided, in one line."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What was decided, as tensors, numbers and strings."""
        ...

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise `ValueError` if `state` is of other layers."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what another one of the same layers decided."""
        ...


class Kept(NamedTuple):
    """What a layer with a stash kept of its inputs in its last forward pass.

    Weak references tell what is the same for several layers: those of one tensor are one object,
    as long as any of them exists.

    Attributes:
        input_bytes: Of the inputs as they were multiplied, which a dense layer keeps.
        stash_bytes: Of what was kept in their place.
        input: The inputs.
        stash: A tensor of the stash; the inputs if they were kept as they are.
        keeper: Who keeps the inputs for its own backward pass, so that they were kept as they are;
            "" if there is a stash.
        mask_bytes: Of the mask of dropout beside the stash, which is never shared.
    """

    input_bytes: int
    stash_bytes: int
    input: weakref.ref[Tensor]
    stash: weakref.ref[Tensor]
    keeper: str = ""
    mask_bytes: int = 0


class LayerState:
    """Configuration and memory of one layer.

    Attributes:
        config: What the backward pass computes.
        memory: The memory, kept between steps; `None` for `memory="none"`.
        stash: What is kept of the inputs, as in `config`: apart from it, because ratios change and
            a compiled graph need not know.
        kept: What the last forward pass kept of the inputs, if there is a stash.
        handle: [number, 0], uint8: represents this object in a graph.
        order: [1], uint8, one per device: every operator that draws random numbers or changes a
            memory declares that it writes to this tensor, which keeps such operators in the order
            of the program, also in a compiled graph.
        shards: The processes among which the columns of X or G are divided, if they are.
        factors: While a list, every backward pass adds the pair of matrices whose product is the
            gradient of the weight as it is stored; `None` if they are not collected.
        on_weight_grad: Called with the gradient of the weight as it is stored, of every backward
            pass, exact ones included, after its factors were added.
        observer: Records the backward passes, if a `Monitor` watches the layer. Copies are
            not watched.
        step_observer: Records those of one step, in the place of the other.
        controller: Who sets `config` from step to step, if it is `ratio="auto"`. Layers that are
            copied together have a copy of theirs.
        name: Of the layer, for its controller.
        is_native: Whether the layer computes as a dense one does, without an operator of ours.
        is_transposed: Whether the weight is stored as [N, P]. Its dW is [P, N] all the same, a view
            of what is contiguous as the weight is.
    """

    memory: Memory | None
    kept: Kept | None = None
    shards: ProcessShards | None = None
    factors: list[Factors] | None = None
    on_weight_grad: Callable[[Tensor], None] | None = None
    observer: Observer | None = None
    step_observer: Observer | None = None
    controller: Controller | None = None
    name: str = ""
    is_native: bool = False

    def __init__(
        self, config: MemAOPConfig, memory: Memory | None, *, is_transposed: bool = False
    ) -> None:
        self.config = config
        self.is_transposed = is_transposed
        self.stash = config.stash
        self.memory = memory
        number = next(_numbers)
        _states[number] = self
        self.handle = torch.empty((number, 0), dtype=torch.uint8, device="cpu")
        self.order = _order(self.handle.device)

    def move(self, device: torch.device) -> None:
        """Put the handle on a device: a graph of that device's operators then has no other."""
        if self.handle.device != device:
            self.handle = torch.empty_like(self.handle, device=device)
            self.order = _order(device)

    def release(self) -> None:
        """Leave the configuration to whoever sets it next, and not to a controller."""
        if self.controller is not None:
            self.controller = None
            self.is_native = False

    def fit(self, in_features: int, out_features: int) -> None:
        """Make the memory one for a weight of this size; it is emptied if it was another's."""
        if self.memory is not None:
            self.memory.fit(self.config, in_features, out_features)

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a module conversion to its device and dtype (`fn` as in `Module._apply`)."""
        if self.memory is not None:
            self.memory.convert(fn)
        self.move(fn(self.handle.new_empty(0)).device)

    def __reduce__(self) -> tuple[Any, ...]:
        # The handle of a copy is on the CPU until its layer moves it, because a file may be read
        # where the device does not exist.
        kept: dict[str, Any] = {"is_transposed": True} if self.is_transposed else {}
        if self.controller is not None:
            kept |= {"controller": self.controller, "name": self.name}
        return type(self), (self.config, self.memory), kept or None


class _StateOfMemory(LayerState):
    """The state of a memory that belongs to no layer. The memory owns it, and not the reverse."""

    @property
    def memory(self) -> Memory | None:
        return self._memory()

    @memory.setter
    def memory(self, memory: Memory | None) -> None:
        assert memory is not None
        self._memory = weakref.ref(memory)


def new_memory(config: MemAOPConfig, in_features: int, out_features: int) -> Memory | None:
    """The empty memory that `config` specifies, to be given to `memaop_linear` in every step.

    It fits a weight of shape [out_features, in_features]. `None` for `memory="none"`.
    """
    memory = kinds.new_memory(config, in_features, out_features)
    if memory is not None:
        state_for(config, memory, torch.device("cpu"))
    return memory


def state_for(config: MemAOPConfig, memory: Memory | None, device: torch.device) -> LayerState:
    """The state of a memory that belongs to no layer; the same one in every call."""
    if memory is None:
        return _state_without_memory(config, device)
    state = memory.layer_states.get(config)
    if not isinstance(state, LayerState) or state.memory is not memory:
        # A shallow copy of a memory comes with the states of the original.
        kept = {c: s for c, s in memory.layer_states.items() if s.memory is memory}
        state = _StateOfMemory(config, memory)
        # Earlier ones stay: a compiled backward pass that is still to run has their handles only.
        newest = [*kept.items(), (config, state)][-_MAX_STATES_OF_A_MEMORY:]
        memory.layer_states = dict(newest)
    return state


# By device, because threads that work on several of them would move the handle back and forth.
@functools.lru_cache(maxsize=_MAX_STATES_WITHOUT_MEMORY)
def _state_without_memory(config: MemAOPConfig, device: torch.device) -> LayerState:
    state = LayerState(config, None)
    state.move(device)
    return state


def find(number: int) -> LayerState:
    """The state whose handle has this first size.

    Raises:
        RuntimeError: Its layer or memory no longer exists.
    """
    state = _states.get(number)
    if state is None:
        raise RuntimeError(
            "the memory of this backward pass is gone: keep the layer (or the memory given to "
            "memaop_linear) until backward has run."
        )
    return state


@functools.cache
def _order(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.uint8, device=device)
