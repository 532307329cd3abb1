"""Tying row memories to the learning rate of the optimizer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from memaop_triton.memory.kinds import ResidualMemory
from memaop_triton.nn.layer_choice import converted_layers
from memaop_triton.nn.linear import MemAOPLayer


def attach_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Let every row memory of `model` follow the learning rate of its weight's parameter group.

    The paper's memories hold rows times √η. Ours hold rows of the gradient, so when the learning
    rate moves from η_prev to η_now the stored rows are rescaled by √(η_prev/η_now), which makes
    plain SGD equal to the paper's update. Without this call the learning rate counts as constant.
    Any scheduler works: the rate is read from `optimizer.param_groups` in each backward pass. In a
    step whose rate is zero the memory is skipped, unless the rate is a tensor, which is not read on
    the host. With a loss scaler the stored rows of G are multiplied by its scale: if it is given
    here, they are rescaled when it changes.

    The link is weak (keep the optimizer and the scaler) and not copied: call this again for a
    `deepcopy` of the model, after unpickling, and for a new optimizer. Layers without a row memory
    need no link.

    Args:
        model: A model with converted layers.
        optimizer: The one that updates their weights, or all of them, as with one optimizer per
            parameter that steps during the backward pass.
        scaler: The `torch.amp.GradScaler` of the training loop, if there is one.

    Raises:
        ValueError: The model has no converted layer, or a trainable weight whose layer has a row
            memory is in none of the optimizers' groups.
    """
    layers = list(converted_layers(model))
    if not layers:
        raise ValueError("model has no converted layer: call convert_(model, config) first.")
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    group_of = {
        id(parameter): (one, number)
        for one in optimizers
        for number, group in enumerate(one.param_groups)
        for parameter in group["params"]
    }
    for name, layer in layers:
        if not isinstance(layer.memory, ResidualMemory):
            continue
        weights = _weight_parameters(layer)
        groups = [group_of[id(weight)] for weight in weights if id(weight) in group_of]
        if groups:
            layer.memory.attach(*groups[0], scaler)
        elif any(weight.requires_grad for weight in weights):
            raise ValueError(
                f"optimizer does not hold the weight of layer {name!r}: pass the optimizer that "
                "updates it, or freeze the weight."
            )


def _weight_parameters(layer: MemAOPLayer) -> list[nn.Parameter]:
    """The Parameter of the weight, or what it is computed from (parametrised, pruned)."""
    if layer.weight_parameter is not None:
        return [layer.weight_parameter]
    bias = ("bias", "parametrizations.bias.")
    return [p for name, p in layer.named_parameters() if not name.startswith(bias)]
