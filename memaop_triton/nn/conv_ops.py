"""The gradient of a convolution's weight as an operator, `memaop_triton::conv_weight_grad`.

As the operators of `memaop_triton.nn.ops` it takes the handle of a `LayerState`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memaop_triton.backward.conv_grad import conv_weight_grad
from memaop_triton.memory.patches import Geometry, as_weight
from memaop_triton.nn import layer_state
from memaop_triton.nn.ops import flops_of_state, register_operator


def _conv_weight_grad(
    x: Tensor,
    g: Tensor,
    handle: Tensor,
    order: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias_grad: bool,
) -> tuple[Tensor, Tensor]:
    """dW [P, C/groups, *kernel_size] and db [P] from x [B, C, *sizes] and g [B, P, *positions].

    db has shape [0] if it is not required.
    """
    state = layer_state.find(handle.shape[0])
    geometry = Geometry(tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), groups)
    gradients = conv_weight_grad(
        x,
        g,
        geometry,
        state.config,
        state.memory,
        bias_grad=bias_grad,
        observer=state.step_observer or state.observer,
    )
    dw = as_weight(gradients.weight, geometry.kernel_size).contiguous()
    if state.on_weight_grad is not None:
        state.on_weight_grad(dw)
    return dw, g.new_empty(0) if gradients.bias is None else gradients.bias


def _conv_weight_grad_fake(
    x: Tensor,
    g: Tensor,
    *_: Any,
    kernel_size: Sequence[int],
    groups: int,
    bias_grad: bool,
    **__: Any,
) -> tuple[Tensor, Tensor]:
    p = g.shape[1]
    dw = x.new_empty((p, x.shape[1] // groups, *kernel_size))
    return dw, g.new_empty(p if bias_grad else 0)


register_operator(
    "memaop_triton::conv_weight_grad", _conv_weight_grad, _conv_weight_grad_fake, writes=["order"]
)


@register_flop_formula(torch.ops.memaop_triton.conv_weight_grad)
def _flops(
    x: torch.Size,
    g: torch.Size,
    handle: torch.Size,
    *_: Any,
    kernel_size: Sequence[int],
    groups: int,
    **__: Any,
) -> int:
    n = x[1] // groups * math.prod(kernel_size)
    return flops_of_state(layer_state.find(handle[0]), g[0] * math.prod(g[2:]), n, g[1])
