"""Bytes that autograd holds for the backward pass, of a model as it is and with layers converted.

They are counted by saved-tensor hooks, every storage once. Parameters and buffers are left out,
which are there anyway. What a custom operation keeps in another way than by `save_for_backward`, or
under saved-tensor hooks of its own (activation checkpointing, offloading), is not held.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from memaop_triton.nn.layer_choice import Chosen
from memaop_triton.nn.linear import MemAOPLayer
from memaop_triton.plan.counting import address_of
from memaop_triton.plan.observing import converted, run_backward, run_forward, untouched

# Of what `ratio="auto"` samples; what a layer keeps hardly depends on it.
_SAMPLED = 1 / 8
# The first backward pass makes the bases of a memory, beside which the next ones keep a part apart.
_STEPS_BEFORE = 2


class Held(NamedTuple):
    """What was counted.

    Attributes:
        dense: Bytes that the graph of a forward pass holds, the layers as they are.
        converted: With the layers converted.
        keepers: Layers, by name, whose stash frees nothing because somebody else keeps their
            inputs, and who that is: the name of a module, or "the loss".
    """

    dense: int
    converted: int
    keepers: dict[str, str]


def measure_held(
    model: nn.Module,
    layers: Chosen,
    example_inputs: object,
    loss_fn: Callable[[Any], Tensor] | None = None,
) -> Held:
    """Count what a graph of the model holds, dense and with `layers` converted.

    Runs the model forward once as it is, and forward and backward a few times converted; it is the
    same afterwards.

    Args:
        model: As for `observe`.
        layers: Those to convert. One with `ratio="auto"` is sampled at 1/8.
        example_inputs: As for `plan`.
        loss_fn: As for `plan`.
    """
    given = {
        name: (layer, config.spending(ratio=_SAMPLED) if config.is_auto else config)
        for name, (layer, config) in layers.items()
    }
    with untouched(model, example_inputs):
        dense = _forward(model, example_inputs, loss_fn)
        with converted(given):
            for _ in range(_STEPS_BEFORE):
                run_backward(model, example_inputs, loss_fn)
            ours = _forward(model, example_inputs, loss_fn)
    return Held(dense.nbytes, ours.nbytes, ours.keepers)


class _Counted(NamedTuple):
    nbytes: int
    keepers: dict[str, str]


def _forward(
    model: nn.Module, example_inputs: object, loss_fn: Callable[[Any], Tensor] | None
) -> _Counted:
    graph = _Graph(model)
    with graph.recorded():
        outputs = run_forward(model, example_inputs, loss_fn)  # the graph is there as long as they
    return graph.count() if outputs else _Counted(0, {})


class _Saved:
    """A tensor as the graph holds it, and the module that saved it."""

    __slots__ = ("__weakref__", "module", "tensor")

    def __init__(self, tensor: Tensor, module: str) -> None:
        self.tensor = tensor
        self.module = module


class _Graph:
    """What is saved in a forward pass of `model`, and by which of its modules."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        lasting = (*model.parameters(), *model.buffers())
        self._lasting = {address_of(tensor) for tensor in lasting}
        self._called: list[str] = []  # the modules that are running, outermost first
        # In the order in which they were saved; those of a part that is gone are dead.
        self._saved: list[weakref.ref[_Saved]] = []
        # Of layers with a stash; alive, so that no other tensor takes an address of theirs.
        self._inputs: defaultdict[str, list[Tensor]] = defaultdict(list)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Inside, what autograd saves is recorded."""
        hooks = (
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave),
        )
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def count(self) -> _Counted:
        """What is held now."""
        sizes: dict[int, int] = {}
        keeper: dict[int | None, str] = {}
        for reference in self._saved:
            saved = reference()
            address = None if saved is None else address_of(saved.tensor)
            if saved is None or address is None or address in self._lasting:
                continue
            sizes[address] = saved.tensor.untyped_storage().nbytes()
            keeper.setdefault(address, saved.module)
        keepers = {}
        for name, inputs in self._inputs.items():
            found = [keeper.get(address_of(x)) for x in inputs]
            if found[0] is not None and None not in found:
                keepers[name] = found[0]
        return _Counted(sum(sizes.values()), keepers)

    def _pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor, self._caller)
        self._saved.append(weakref.ref(saved))
        return saved

    def _enter(self, module: nn.Module, args: Any) -> None:
        name = self._names.get(id(module))
        self._called.append(self._caller if name is None else name or "the model itself")
        if isinstance(module, MemAOPLayer) and module.training:
            module.layer_state.kept = None

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._called.pop()
        if isinstance(module, MemAOPLayer) and module.training:
            kept = module.layer_state.kept
            x = None if kept is None or kept.keeper else kept.input()
            if x is not None:  # else it was cast for this layer, and the cast is gone in any case
                self._inputs[self._names[id(module)]].append(x)

    @property
    def _caller(self) -> str:
        return self._called[-1] if self._called else "the loss"
