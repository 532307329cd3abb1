"""Convolutions whose weight gradient is computed from some of their patches.

A row of X is the patch under the kernel at one position of the output, a row of G the gradient
there, so that M = samples × positions (`memaop_triton.memory.patches`). A convolution of one tap
without stride is a linear layer on positions, and is computed as one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from memaop_triton.config import MemAOPConfig, check_config
from memaop_triton.memory.maps import is_channels_last
from memaop_triton.memory.patches import Convolution, Geometry
from memaop_triton.nn import conv_ops as conv_ops  # registers its operator
from memaop_triton.nn.autograd import (
    LayerFunction,
    autocast,
    caches_signature,
    check_not_batched,
    gradients_once,
    handle_and_order,
    is_autocast,
    wanted_gradients,
)
from memaop_triton.nn.classes import shallow_copy, stands_for_dense
from memaop_triton.nn.layer_state import LayerState
from memaop_triton.nn.linear import MemAOPLayer, MemAOPLinear, adopt, traced


class MemAOPConv(MemAOPLayer):
    """What all converted convolutions share."""

    # Those of the dense class.
    in_channels: int
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    out_channels: int

    # Left out by torch.jit.script, which makes a dense layer.
    __jit_ignored_attributes__ = MemAOPLinear.__jit_ignored_attributes__
    __jit_unused_properties__ = (
        *MemAOPLinear.__jit_unused_properties__,
        "in_features",
        "out_features",
    )

    def __init__(self, *args: Any, config: MemAOPConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_config(MemAOPConfig() if config is None else config)

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """N, the length of a patch: input channels of a group times taps."""
        return self.in_channels // self.groups * math.prod(self.kernel_size)

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """P, the number of output channels."""
        return self.out_channels

    def forward(self, input: Tensor) -> Tensor:
        """[B, in_channels, *sizes], or without B, to [B, out_channels, *positions]."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            y: Tensor = self._conv_forward(input, self.weight, self.bias)  # type: ignore[operator]
            return y
        else:  # noqa: RET505, TorchScript leaves out this branch, and nothing that follows it
            return self._forward(input)

    @torch.jit.unused
    def _forward(self, input: Tensor) -> Tensor:
        dense: Callable[[Tensor], Tensor] = super().forward
        if isinstance(input, torch.fx.Proxy):
            call: Tensor = traced(self, input, dense)
            return call
        dims = len(self.kernel_size)
        if self._is_dense() or input.dim() not in (dims + 1, dims + 2):  # the latter raises
            return dense(input)
        return self._convolve(input)

    def _convolve(self, input: Tensor) -> Tensor:
        if input.is_complex():
            raise TypeError(
                f"input must be of a floating-point dtype, got {input.dtype}: leave the layer "
                "dense, with filter_fn."
            )
        weight, bias = self.weight, cast("Tensor | None", self.bias)
        dims = len(self.kernel_size)
        if is_autocast(input.device.type):
            input, weight = autocast(input), autocast(weight)
            bias = None if bias is None else autocast(bias)
        x = input if input.dim() == dims + 2 else input.unsqueeze(0)
        before, geometry = _geometry_of(self, weight)
        if before:
            mode = cast("str", self.padding_mode)
            x = F.pad(x, before, mode="constant" if mode == "zeros" else mode)
        y = _conv_of_state(x, weight, bias, self.layer_state, geometry)
        return y if input.dim() == dims + 2 else y.squeeze(0)

    def _set_config(self, config: MemAOPConfig) -> None:
        super()._set_config(checked_for(self, config))

    @classmethod
    def from_conv(cls, conv: _ConvNd, config: MemAOPConfig | None = None) -> MemAOPConv:
        """A new layer that shares the Parameters of `conv` and keeps its hooks and mode.

        Raises:
            TypeError: `conv` is not of the class that this one stands for.
            ValueError: `conv` is a subclass with a forward pass of its own, not initialised,
                depthwise, or `config` is not for convolutions.
        """
        if not isinstance(conv, cls.dense_class):
            name = cls.dense_class.__name__
            raise TypeError(f"conv must be an nn.{name}, got {type(conv).__name__}.")
        return adopt(shallow_copy(conv), cls.dense_class, cls, config)


@stands_for_dense
class MemAOPConv1d(MemAOPConv, nn.Conv1d):
    """`torch.nn.Conv1d` whose backward pass is computed as configured by `config`.

    The arguments are those of `nn.Conv1d`, and `config`: `MemAOPConfig()` if `None`. It takes no
    memory of rows, no stash, no approximate dX and no cheap scores. With several groups one
    selection serves all of them, and there is no subspace; one input channel in each is refused.
    """

    dense_class: type[nn.Module] = nn.Conv1d


@stands_for_dense
class MemAOPConv2d(MemAOPConv, nn.Conv2d):
    """`torch.nn.Conv2d` whose backward pass is computed as configured by `config`.

    The arguments are those of `nn.Conv2d`, and `config` as for `MemAOPConv1d`.
    """

    dense_class: type[nn.Module] = nn.Conv2d


@stands_for_dense
class MemAOPConv3d(MemAOPConv, nn.Conv3d):
    """`torch.nn.Conv3d` whose backward pass is computed as configured by `config`.

    The arguments are those of `nn.Conv3d`, and `config` as for `MemAOPConv1d`.
    """

    dense_class: type[nn.Module] = nn.Conv3d


CONVOLUTIONS: dict[type[nn.Module], type[MemAOPConv]] = {
    nn.Conv1d: MemAOPConv1d,
    nn.Conv2d: MemAOPConv2d,
    nn.Conv3d: MemAOPConv3d,
}


def convolution_of(conv: _ConvNd, input: Tensor) -> Convolution:
    """What a call of a layer, dense or converted, with this input works on."""
    before, geometry = _geometry_of(conv, conv.weight)
    dims = len(geometry.kernel_size)
    x = input if input.dim() == dims + 2 else input.unsqueeze(0)
    around = [sum(both) for both in zip(before[::2], before[1::2], strict=True)][::-1]
    sizes = (size + more for size, more in zip(x.shape[2:], around or [0] * dims, strict=True))
    return Convolution(geometry, (*x.shape[:2], *sizes), is_channels_last(x))


def new_conv(
    convolution: Convolution, out_channels: int, *, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A dense layer that makes such a call."""
    (kernel_size, stride, padding, dilation, groups), (_, in_channels, *_), _ = convolution
    dense: Any = list(CONVOLUTIONS)[len(kernel_size) - 1]
    layer: nn.Module = dense(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        device=device,
        dtype=dtype,
    )
    return layer


def _geometry_of(conv: Any, weight: Tensor) -> tuple[list[int], Geometry]:
    """What `F.pad` adds before, and the convolution then: as many zeros at either end.

    As the dense layer's attributes say when it is called: models change them after construction.
    """
    kernel_size = tuple(weight.shape[2:])
    dims = len(kernel_size)
    stride, dilation = _of_each(conv.stride, dims), _of_each(conv.dilation, dims)
    before: list[int] = []
    padding: tuple[int, ...] = (0,) * dims
    if conv.padding_mode != "zeros":
        before = list(conv._reversed_padding_repeated_twice)
    elif conv.padding == "same":
        spans = [gap * (taps - 1) for gap, taps in zip(dilation, kernel_size, strict=True)]
        padding = tuple(span // 2 for span in spans)
        if any(span % 2 for span in spans):
            before = [pad for span in reversed(spans) for pad in (span // 2, span - span // 2)]
            padding = (0,) * dims
    elif conv.padding != "valid":
        padding = _of_each(conv.padding, dims)
    return before, Geometry(kernel_size, stride, padding, dilation, conv.groups)


def _of_each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """A number for each dimension, from one for all of them or one each."""
    return (value,) * dims if isinstance(value, int) else tuple(value)


def is_depthwise(conv: nn.Module) -> bool:
    """Whether each group has one input channel: its dW is no product of matrices worth sampling."""
    return isinstance(conv, _ConvNd) and conv.groups == conv.in_channels > 1


def checked_for(conv: nn.Module, config: MemAOPConfig) -> MemAOPConfig:
    """`config` as a convolution uses it: with several groups without a subspace.

    Raises:
        ValueError: It is not for convolutions, or the convolution is depthwise.
        TypeError: It is no `MemAOPConfig`.
    """
    check_config(config)
    if is_depthwise(conv):
        raise ValueError("a depthwise convolution has nothing to sample: leave it dense.")
    obstacle = obstacle_in(config)
    if obstacle:
        raise ValueError(f"{obstacle} is for linear layers: a convolution takes none.")
    if config.subspace is not None and cast("int", conv.groups) > 1:
        return dataclasses.replace(config, memory=None)
    return config


def obstacle_in(config: MemAOPConfig) -> str:
    """The setting that is not for convolutions; "" if there is none."""
    if config.row_memory is not None:
        return f"memory={config.memory_name!r}"
    for name in ("grad_input", "stash"):
        value = config.grad_input_name if name == "grad_input" else config.stash
        if value != "exact":
            return f"{name}={value!r}"
    return "" if config.scores == "norms" else f"scores={config.scores!r}"


@caches_signature
class _MemAOPConvFunction(LayerFunction):
    """A convolution with the approximate backward pass; touches the memory in backward only."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        handle: Tensor,
        order: Tensor,
        state: LayerState,
        geometry: Geometry,
    ) -> Tensor:
        return _dense(x, weight, bias, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.handle, ctx.order, ctx.state, ctx.geometry = inputs
        ctx.input_shape = x.shape
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradients = gradients_once(
            grad_output, (x, weight), lambda: _backward(ctx, grad_output, x, weight)
        )
        return *gradients, None, None, None, None


def _backward(
    ctx: Any, g: Tensor, x: Tensor | None, weight: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    check_not_batched(g)
    wants_x, wants_weight, wants_bias = wanted_gradients(ctx)
    geometry: Geometry = ctx.geometry
    dx = dw = db = None
    if wants_x and weight is not None:
        # Of the inputs only the shape is read.
        inputs = g.new_empty(1).expand(ctx.input_shape) if x is None else x
        dx = torch.ops.aten.convolution_backward(
            g,
            inputs,
            weight,
            None,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            False,
            [0] * len(geometry.stride),
            geometry.groups,
            (True, False, False),
        )[0]
    if wants_weight and x is not None:
        dw, db = torch.ops.memaop_triton.conv_weight_grad(
            x, g, ctx.handle, ctx.order, **geometry._asdict(), bias_grad=wants_bias
        )
    elif wants_bias:
        db = g.sum((0, *range(2, g.dim())))
    return dx, dw, db if wants_bias else None


def _conv_of_state(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: LayerState, geometry: Geometry
) -> Tensor:
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return _dense(x, weight, bias, geometry)
    handle, order = handle_and_order(state, x.device)
    result: Tensor = _MemAOPConvFunction.apply(x, weight, bias, handle, order, state, geometry)
    return result


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    _, stride, padding, dilation, groups = geometry
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[len(stride) - 1]
    y: Tensor = convolve(x, weight, bias, stride, padding, dilation, groups)
    return y
