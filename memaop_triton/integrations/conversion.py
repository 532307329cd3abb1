"""What the integrations share: a conversion that waits for its model, what is saved, and figures.

What is saved holds tensors, numbers and strings only, so it can be read where this package is not
installed.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from memaop_triton import (
    MemAOPConfig,
    attach_optimizer,
    convert_,
    coverage,
    load_memory_state_dict,
    memory_state_dict,
    reset_memory,
)
from memaop_triton.auto.controller import Controller
from memaop_triton.auto.worth import EXACT
from memaop_triton.nn.layer_choice import converted_layers
from memaop_triton.nn.linear import MemAOPLayer
from memaop_triton.nn.lora import converted_lora_layers

#: The prefix of `figures`.
PREFIX = "memaop"


class Conversion:
    """What `convert_` is to be called with, once a training loop has its model.

    Args:
        config: As for `convert_`.
        arguments: Its other arguments, by name.

    Raises:
        TypeError: `convert_` has no such argument.
    """

    def __init__(self, config: MemAOPConfig | None, arguments: Mapping[str, Any]) -> None:
        inspect.signature(convert_).bind(nn.Identity(), config, **arguments)
        self._config, self._arguments = config, dict(arguments)
        self._was_applied = False

    def apply_(self, model: nn.Module) -> None:
        """Convert `model`, unless this was done before.

        A model that somebody else has converted stays as it is, if nothing was asked for.

        Raises:
            ValueError, TypeError: As `convert_`; a model is converted already, and a configuration
                or an argument was given.
        """
        asks_for_nothing = self._config is None and not self._arguments
        if not (is_converted(model) and (self._was_applied or asks_for_nothing)):
            convert_(model, self._config, **self._arguments)
        self._was_applied = True


def is_converted(model: nn.Module) -> bool:
    """Whether a model has converted layers, those of PEFT included."""
    found = (next(converted_layers(model), None), next(converted_lora_layers(model), None))
    return any(layer is not None for layer in found)


def attach(
    model: nn.Module,
    optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler | None,
) -> None:
    """`attach_optimizer`, for a model that may have converted layers of PEFT only."""
    if next(converted_layers(model), None) is not None:
        attach_optimizer(model, optimizers, scaler)


def gather_state(model: nn.Module, **others: Any) -> dict[str, Any]:
    """Memories and decisions of all processes, for a file that one of them writes.

    All processes have to call this together, because they exchange what they have: every process
    has memories of its own.

    Args:
        model: Has converted layers.
        others: What else each process wants to find again, such as the state of its generators.

    Returns:
        `{"processes": [...]}`, by rank; the tensors of several processes are on the CPU.
    """
    mine: dict[str, Any] = {"memories": memory_state_dict(model), **others}
    _, size = _rank_and_size()
    if size == 1:
        return {"processes": [mine]}
    processes: list[Any] = [None] * size
    dist.all_gather_object(processes, _on_cpu(mine))
    return {"processes": processes}


def own_part(state: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What this process put into `gather_state`; `None` if other processes than now did."""
    rank, size = _rank_and_size()
    processes: list[Mapping[str, Any]] = state["processes"]
    return processes[rank] if len(processes) == size else None


def load_gathered_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load the memories and decisions that `gather_state` gave, in every process its own.

    If another number of processes saved them, memories start empty, and a warning says so.

    Raises:
        ValueError: As `load_memory_state_dict`.
    """
    own = own_part(state)
    if own is not None:
        load_memory_state_dict(model, own["memories"])
        return
    saved, size = len(state["processes"]), _rank_and_size()[1]
    start_empty(model, f"{saved} processes saved the memories and {size} load them")


def start_empty(model: nn.Module, reason: str) -> None:
    """Empty all memories, and warn."""
    reset_memory(model)
    warnings.warn(
        f"{reason}: the memories start empty, and decisions of ratio='auto' are taken anew. The "
        "gradients are right, only noisier or less complete at first.",
        stacklevel=2,
    )


def figures(model: nn.Module) -> dict[str, float]:
    """What is known about the gradients of a converted model, under `memaop/name`, for a log.

    coverage            Share of the weight matrices whose gradients converted layers compute.
    sampled_share       Share of these that are sampled now, and not exact.
    noise_to_signal     V/D of `ratio="auto"`: variance that sampling adds over ‖dW‖².
    predicted_speedup   Seconds of an exact step over those of a sampled one.
    predicted_progress  Progress per second over dense's, as `model_report` has it.
    realised_progress   The same as it was measured, by the last trial.

    The last four are those of the last decision; they are left out before there is one. A model
    that was converted part by part has one set of them for each, `memaop/0/…`, `memaop/1/…`.
    """
    layers = [layer for _, layer in converted_layers(model)]
    result = {f"{PREFIX}/coverage": coverage(model).share}
    elements = _trained_elements(layers)
    if elements:
        sampled = _trained_elements(one for one in layers if one.config.ratio != EXACT)
        result[f"{PREFIX}/sampled_share"] = sampled / elements
    found = dict.fromkeys(layer.layer_state.controller for layer in layers)
    controllers = [one for one in found if isinstance(one, Controller)]
    for number, one in enumerate(controllers):
        prefix = PREFIX if len(controllers) == 1 else f"{PREFIX}/{number}"
        if one.predicted is not None:
            result[f"{prefix}/noise_to_signal"] = one.predicted.noise
            result[f"{prefix}/predicted_speedup"] = one.predicted.speedup
            result[f"{prefix}/predicted_progress"] = one.predicted.progress
        if one.realised is not None:
            result[f"{prefix}/realised_progress"] = one.realised
    return result


def _trained_elements(layers: Iterable[MemAOPLayer]) -> int:
    """Elements of the layers' weights that are not frozen, each once.

    A projection has a part of a Parameter. More layers may share one than it has parts, because
    those for another way of calling an attention are layers too.
    """
    weights: dict[int, nn.Parameter] = {}
    elements: dict[int, int] = {}
    for layer in layers:
        weight = layer.weight_parameter
        if weight is not None and weight.requires_grad:
            weights[id(weight)] = weight
            own = math.prod(layer.gradient_shape)
            elements[id(weight)] = elements.get(id(weight), 0) + own
    return sum(min(elements[key], weight.numel()) for key, weight in weights.items())


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _on_cpu(part) for name, part in value.items()}
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _rank_and_size() -> tuple[int, int]:
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()
