"""The backward pass of one linear layer, timed: dense and ours in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memaop_triton.config import MemAOPConfig
from memaop_triton.memory.kinds import SubspaceMemory
from memaop_triton.nn.functional import no_autocast
from memaop_triton.nn.linear import MemAOPLinear
from memaop_triton.plan.timing import time_in_turn

_NEVER = 1 << 30
# Of the time for a layer: what its forward pass adds is small and soon known.
_FORWARD_SHARE = 0.1


class Use(NamedTuple):
    """What one backward pass through a layer has to compute.

    Attributes:
        rows: M.
        in_features: N.
        out_features: P.
        dtype: Of the rows of X and G.
        device: Where they are.
        needs_weight: Whether dW is wanted.
        needs_bias: Whether db is.
        needs_input: Whether dX is.
    """

    rows: int
    in_features: int
    out_features: int
    dtype: torch.dtype
    device: torch.device
    needs_weight: bool = True
    needs_bias: bool = True
    needs_input: bool = True


class Measurement(NamedTuple):
    """Seconds of one backward pass, in every round.

    Attributes:
        dense: Of an `nn.Linear`.
        ours: Of a `MemAOPLinear`, with what its forward pass takes longer.
        memory_bytes: What its memory holds.
    """

    dense: list[float]
    ours: list[float]
    memory_bytes: int


def measure(use: Use, config: MemAOPConfig, budget: float) -> Measurement:
    """Time random rows of the shape of `use`, for about `budget` seconds.

    Draws from the default generators. On a GPU kernels may be tuned on first use: that, like
    everything on first use, is not part of the times, and comes on top of the budget.
    """
    # Gradients are on then, whatever the caller has switched off.
    with torch.inference_mode(False), no_autocast(use.device.type):
        dense, x = _layer(use), _rows(use, use.in_features).requires_grad_(use.needs_input)
        g = _rows(use, use.out_features)
        paces = _paces(config)
        layers = [_paced(MemAOPLinear.from_linear(dense, config), pace) for pace, _ in paces]
        calls = [_backward(layer, x, g) for layer in (dense, *layers)]
        dense_times, *our_times = time_in_turn(calls, use.device, budget * (1 - _FORWARD_SHARE))
        extra = _forward_overhead(use, config, budget * _FORWARD_SHARE)
    ours = [
        extra + sum(share * t for (_, share), t in zip(paces, times, strict=True))
        for times in zip(*our_times, strict=True)
    ]
    memory = layers[0].memory
    return Measurement(dense_times, ours, 0 if memory is None else memory.nbytes)


def _paces(config: MemAOPConfig) -> list[tuple[int, float]]:
    """Steps between two refreshes that are timed, and the share of each in a step.

    A subspace is refreshed in some steps only, more rarely than there are rounds.
    """
    if config.period == 1:
        return [(1, 1.0)]
    often = 1 / config.period
    return [(_NEVER, 1 - often), (1, often)]


def _paced(layer: MemAOPLinear, refresh_every: int) -> MemAOPLinear:
    if isinstance(layer.memory, SubspaceMemory):
        layer.memory.set_refresh_interval(refresh_every)
    return layer


def _layer(use: Use) -> nn.Linear:
    layer = nn.Linear(use.in_features, use.out_features, device=use.device, dtype=use.dtype)
    layer.weight.requires_grad_(use.needs_weight)
    layer.bias.requires_grad_(use.needs_bias)
    return layer


def _rows(use: Use, columns: int) -> Tensor:
    return torch.randn(use.rows, columns, device=use.device, dtype=use.dtype)


def _backward(layer: nn.Linear, x: Tensor, g: Tensor) -> Callable[[], object]:
    y = layer(x)
    wanted = [t for t in (layer.weight, layer.bias, x) if t.requires_grad]
    return lambda: torch.autograd.grad(y, wanted, g, retain_graph=True)


def _forward_overhead(use: Use, config: MemAOPConfig, budget: float) -> float:
    """Seconds by which the forward pass of ours is longer, seen where there is little else."""
    small = use._replace(rows=1, in_features=8, out_features=8)
    dense, x = _layer(small), _rows(small, 8).requires_grad_()
    ours = MemAOPLinear.from_linear(dense, config)
    times = time_in_turn([lambda: dense(x), lambda: ours(x)], use.device, budget)
    without, with_ours = map(statistics.median, times)
    return max(0.0, with_ours - without)
