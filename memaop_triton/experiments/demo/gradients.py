"""What the weight gradients of trained networks cost: time, operations and memory."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memaop_triton import MemAOPLinear
from memaop_triton.auto.timing import time_in_turn
from memaop_triton.backward.weight_grad import weight_grad
from memaop_triton.flops import weight_grad_flops
from memaop_triton.memory.subspace import SubspaceMemory
from memaop_triton.nn.layer_choice import converted_layers

_SECONDS = 3.0  # that all networks are timed for, about


class Cost(NamedTuple):
    """Of the weight gradients of one batch, over the layers that a scheme may sample.

    Attributes:
        seconds: Median time.
        flops: Operations beside dense's.
        memory_bytes: Held by the memories of the network.
    """

    seconds: float = 0.0
    flops: float = 1.0
    memory_bytes: int = 0


class _Rows(NamedTuple):
    """A layer, its inputs [M, N] and the gradients of its outputs [M, P]."""

    layer: nn.Linear
    x: Tensor
    g: Tensor


def costs_of(models: Sequence[nn.Module], x: Tensor, y: Tensor) -> list[Cost]:
    """Costs of copies of one network, converted or not, timed in turn.

    Args:
        models: The layers that any of them has converted are looked at in all.
        x: A batch of inputs.
        y: [B] its classes.
    """
    names = {name for model in models for name, _ in converted_layers(model)}
    passes = [_pass(model, names, x, y) for model in models]
    with torch.no_grad():
        calls = [functools.partial(_run, [_call(rows) for rows in found]) for found in passes]
        times = time_in_turn(calls, x.device, _SECONDS)
    return [
        Cost(statistics.median(seconds), _flops(found), _memory_bytes(found))
        for seconds, found in zip(times, passes, strict=True)
    ]


def _pass(model: nn.Module, names: set[str], x: Tensor, y: Tensor) -> list[_Rows]:
    """What one pass gives these layers."""
    model.eval()  # the backward pass is exact and does not change the memories
    found: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for name, layer in model.named_modules():
        if name in names:
            hooks.append(layer.register_forward_hook(functools.partial(_keep, found, name)))
    nn.functional.cross_entropy(model(x), y).backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    layers = dict(model.named_modules())
    rows = []
    for name, (inputs, output) in found.items():
        layer = layers[name]
        assert isinstance(layer, nn.Linear)
        assert output.grad is not None
        rows.append(_Rows(layer, inputs.flatten(0, -2), output.grad.flatten(0, -2)))
    return rows


def _keep(
    found: dict[str, tuple[Tensor, Tensor]], name: str, _: Any, inputs: Any, output: Tensor
) -> None:
    output.retain_grad()
    found[name] = (inputs[0].detach(), output)


def _is_sampling(layer: nn.Linear) -> bool:
    return isinstance(layer, MemAOPLinear) and not layer.layer_state.is_native


def _call(rows: _Rows) -> Callable[[], Tensor]:
    """Computes the layer's weight gradient the way its scheme does."""
    layer = rows.layer
    if isinstance(layer, MemAOPLinear) and _is_sampling(layer):
        return functools.partial(weight_grad, rows.x, rows.g, layer.config, layer.memory)
    return functools.partial(torch.mm, rows.g.t(), rows.x)


def _run(calls: Sequence[Callable[[], Tensor]]) -> None:
    for call in calls:
        call()


def _flops(found: Sequence[_Rows]) -> float:
    dense = ours = 0
    for layer, x, _ in found:
        m, n, p = len(x), layer.in_features, layer.out_features
        dense += 2 * m * n * p
        if isinstance(layer, MemAOPLinear) and _is_sampling(layer):
            subspace = layer.memory.cost if isinstance(layer.memory, SubspaceMemory) else None
            k = layer.config.num_rows(m, n, p, subspace)
            ours += weight_grad_flops(m, n, p, k, subspace)
        else:
            ours += 2 * m * n * p
    return ours / dense


def _memory_bytes(found: Sequence[_Rows]) -> int:
    layers = [rows.layer for rows in found if isinstance(rows.layer, MemAOPLinear)]
    return sum(layer.memory.nbytes for layer in layers if layer.memory)
