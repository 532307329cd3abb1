"""Saving, loading and clearing the memories of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from memaop_triton.memory.kinds import Memory
from memaop_triton.nn.layer_choice import converted_layers
from memaop_triton.nn.layer_state import Controller


def memory_state_dict(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The memories of a model by qualified layer name, for `torch.save` beside its `state_dict`.

    With layers that have `ratio="auto"`, what was decided about them is in it too, under a name of
    its own. Of decisions that are frozen (`auto_freeze`) a resumed run goes on bit for bit; others
    are taken anew in time, from new observations.

    Holds tensors, numbers and strings only, so `torch.load(..., weights_only=True)` reads it. As
    with `Module.state_dict` the tensors are the memories' own: copy them to keep a snapshot.
    """
    return {name: part.state_dict() for name, part in _parts(model).items()}


def load_memory_state_dict(model: nn.Module, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Put saved memories back into a model with the same converted layers.

    Every process of a distributed run saves and loads its own. A layer that is divided by tensor
    parallelism and fully sharded on top gets its part of the columns in its first forward pass:
    load after that.

    Raises:
        ValueError: Layers are missing or unknown, or a memory is of another kind or shape; the
            message names the layer. The model's memories are unchanged then.
    """
    check_memory_state_dict(model, state)
    for name, part in _parts(model).items():
        part.load_state_dict(state[name])


def check_memory_state_dict(model: nn.Module, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise the `ValueError` that `load_memory_state_dict` would raise; nothing is changed."""
    parts = _parts(model)
    missing, unknown = parts.keys() - state.keys(), state.keys() - parts.keys()
    if missing or unknown:
        raise ValueError(
            f"state does not fit the model: missing {sorted(missing)}, unknown {sorted(unknown)}. "
            "Convert the model with the configuration that the state was saved under."
        )
    for name, part in parts.items():
        try:
            part.check_state(state[name])
        except ValueError as error:
            raise ValueError(f"memory of layer {name!r}: {error}") from None


def reset_memory(model: nn.Module) -> None:
    """Empty the memory of every converted layer, as after conversion."""
    for memory in _memories(model).values():
        memory.reset()


def _parts(model: nn.Module) -> dict[str, Memory | Controller]:
    """What is saved: memories by layer, and the controllers of `ratio="auto"`."""
    found = (layer.layer_state.controller for _, layer in converted_layers(model))
    controllers = [one for one in dict.fromkeys(found) if one is not None]
    parts: dict[str, Memory | Controller] = {**_memories(model)}
    # Names that no module has.
    return parts | {f"ratio=auto {number}": one for number, one in enumerate(controllers)}


def _memories(model: nn.Module) -> dict[str, Memory]:
    return {
        name: layer.memory for name, layer in converted_layers(model) if layer.memory is not None
    }
