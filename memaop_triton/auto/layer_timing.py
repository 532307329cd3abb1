"""Times of the backward pass of one layer, dense and converted in turn."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memaop_triton.auto.timing import SHORTEST_SECONDS, time_in_turn
from memaop_triton.config import MemAOPConfig
from memaop_triton.memory.kinds import Memory, SubspaceMemory
from memaop_triton.memory.patches import Convolution
from memaop_triton.nn.autograd import no_autocast
from memaop_triton.nn.classes import shallow_copy
from memaop_triton.nn.conv import new_conv
from memaop_triton.nn.layer_choice import adopt_
from memaop_triton.nn.linear import MemAOPLayer

_NEVER = 1 << 30
# Of the time for a layer. The additional time of its forward pass is small and quickly measured.
_FORWARD_SHARE = 0.1


class Use(NamedTuple):
    """What one backward pass through a layer has to compute.

    Attributes:
        rows: M.
        in_features: N.
        out_features: P.
        dtype: Of the rows of X and G.
        device: Where they are.
        needs_weight: Whether dW is required.
        needs_bias: Whether db is.
        needs_input: Whether dX is.
        convolution: What it is a call of, if it is not one of a linear layer.
    """

    rows: int
    in_features: int
    out_features: int
    dtype: torch.dtype
    device: torch.device
    needs_weight: bool = True
    needs_bias: bool = True
    needs_input: bool = True
    convolution: Convolution | None = None


class Measurement(NamedTuple):
    """Seconds of one backward pass, in every round.

    Attributes:
        dense: Of a dense layer.
        ours: Of a converted one, including the additional time of its forward pass.
        memory_bytes: What its memory holds.
    """

    dense: list[float]
    ours: list[float]
    memory_bytes: int


def measure(use: Use, config: MemAOPConfig, budget: float) -> Measurement:
    """Time random rows of the shape of `use`, for about `budget` seconds.

    Draws from the default generators. Work on first use, as the tuning of kernels on a GPU, is not
    part of the times and is not counted in the budget.
    """
    (found,) = measure_each(use, [config], budget)
    return found


def measure_each(
    use: Use,
    configs: Sequence[MemAOPConfig],
    budget: float,
    shortest: float = SHORTEST_SECONDS,
    exact: MemAOPConfig | None = None,
) -> list[Measurement]:
    """`measure` for several configurations in turn, beside one dense layer.

    They may differ in their numbers of rows only: what a refresh of the subspace takes is measured
    for the first one, and is the same for all. `shortest` is that of `time_in_turn`. With `exact`,
    a layer of ours with this configuration takes the place of the dense one, and forward passes,
    which are the same for all, are not compared.
    """
    # This also switches gradients on, even if the caller has switched them off.
    with torch.inference_mode(False), no_autocast(use.device.type):
        dense, x = _layer(use), _inputs(use).requires_grad_(use.needs_input)
        g = _gradients(use)
        ours = _layers_of(dense, configs, x, g)
        beside = dense if exact is None else _converted(dense, exact)
        timed: list[nn.Module] = [beside, *ours]
        # A refresh happens in one of `period` steps, too rarely to be in enough of the rounds. So
        # steps without any are timed, and beside them steps with one each.
        period = configs[0].period
        if period > 1:
            timed.append(_layer_of(dense, configs[0], ours[0].memory))
            for layer, interval in zip(timed[1:], [*[_NEVER] * len(ours), 1], strict=True):
                _set_interval(layer, interval)
        calls = [_backward(layer, x, g) for layer in timed]
        for_calls, for_forward = budget * (1 - _FORWARD_SHARE), budget * _FORWARD_SHARE
        dense_times, *times = time_in_turn(calls, use.device, for_calls, shortest)
        extra = 0.0
        if exact is None:
            extra = _forward_overhead(use, configs[0], for_forward, shortest)
    if period > 1:
        refreshing, first = (statistics.median(of_layer) for of_layer in (times[-1], times[0]))
        extra += max(0.0, refreshing - first) / period
    found = []
    for layer, of_layer in zip(ours, times, strict=False):
        held = 0 if layer.memory is None else layer.memory.nbytes
        found.append(Measurement(dense_times, [extra + one for one in of_layer], held))
    return found


def _layers_of(
    dense: nn.Module, configs: Sequence[MemAOPConfig], x: Tensor, g: Tensor
) -> list[MemAOPLayer]:
    """A layer for each configuration, with the weight of `dense`.

    A first step makes bases and chooses among them, which takes as long as many others. It is the
    same for all, but for the rows that are left beside a choice: one layer takes it.
    """
    first = _converted(dense, configs[0])
    if first.memory is not None:
        _backward(first, x, g)()
    return [first, *(_layer_of(dense, config, first.memory) for config in configs[1:])]


def _converted(dense: nn.Module, config: MemAOPConfig) -> MemAOPLayer:
    return adopt_(shallow_copy(dense), config)


def _layer_of(dense: nn.Module, config: MemAOPConfig, memory: Memory | None) -> MemAOPLayer:
    """A layer with the weight of `dense` and a copy of a memory."""
    layer = _converted(dense, config)
    layer.layer_state.memory = copy.deepcopy(memory)
    return layer


def _set_interval(layer: nn.Module, refresh_every: int) -> None:
    assert isinstance(layer, MemAOPLayer)
    if isinstance(layer.memory, SubspaceMemory):
        layer.memory.set_refresh_interval(refresh_every)


def _layer(use: Use) -> nn.Module:
    layer: nn.Module
    if use.convolution is None:
        layer = nn.Linear(use.in_features, use.out_features, device=use.device, dtype=use.dtype)
    else:
        layer = new_conv(use.convolution, use.out_features, device=use.device, dtype=use.dtype)
    layer.get_parameter("weight").requires_grad_(use.needs_weight)
    layer.get_parameter("bias").requires_grad_(use.needs_bias)
    return layer


def _inputs(use: Use) -> Tensor:
    if use.convolution is None:
        return _random(use, use.rows, use.in_features)
    return _maps(use, *use.convolution.inputs)


def _gradients(use: Use) -> Tensor:
    if use.convolution is None:
        return _random(use, use.rows, use.out_features)
    geometry, (batch, _, *sizes), _ = use.convolution
    return _maps(use, batch, use.out_features, *geometry.positions(tuple(sizes)))


def _maps(use: Use, batch: int, channels: int, *sizes: int) -> Tensor:
    assert use.convolution is not None
    if use.convolution.is_channels_last:
        return _random(use, batch, *sizes, channels).movedim(-1, 1)
    return _random(use, batch, channels, *sizes)


def _random(use: Use, *sizes: int) -> Tensor:
    return torch.randn(sizes, device=use.device, dtype=use.dtype)


def _backward(layer: nn.Module, x: Tensor, g: Tensor) -> Callable[[], object]:
    # With `grad_outputs` PyTorch would import its symbolic shapes first, a third of a second.
    wanted = [t for t in (*layer.parameters(), x) if t.requires_grad]
    is_stashing = isinstance(layer, MemAOPLayer) and layer.config.stash != "exact"
    if is_stashing:
        # A leaf would be kept as it is, and what else is kept hangs on the basis of the memory,
        # which the first backward pass makes.
        torch.autograd.grad(_Loss.apply(layer(x.clone()), g), wanted)
    loss = _Loss.apply(layer(x.clone() if is_stashing else x), g)
    return lambda: torch.autograd.grad(loss, wanted, retain_graph=True)


class _Loss(torch.autograd.Function):
    """A number whose gradient by `y` is `g`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(g)
        return y.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        (g,) = ctx.saved_tensors
        return g, None


def _forward_overhead(use: Use, config: MemAOPConfig, budget: float, shortest: float) -> float:
    """Additional seconds of a converted layer's forward pass.

    Measured on a tiny layer, unless it reads its inputs, to keep them in another form.
    """
    if config.stash == "exact":
        use = use._replace(rows=1, in_features=8, out_features=8, convolution=None)
    dense, x = _layer(use), _inputs(use).requires_grad_()
    ours = _converted(dense, config)
    times = time_in_turn([lambda: dense(x), lambda: ours(x)], use.device, budget, shortest)
    without, with_ours = map(statistics.median, times)
    return max(0.0, with_ours - without)
