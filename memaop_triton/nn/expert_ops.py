"""The weight gradients of experts as an operator, `torch.ops.memaop_triton.experts_weight_grad`.

As the operators of `memaop_triton.nn.ops` it takes the handle of a `LayerState`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memaop_triton.backward.experts import experts_weight_grad
from memaop_triton.nn import layer_state
from memaop_triton.nn.ops import flops_of_state, register_operator


def _experts_weight_grad(
    x: Tensor, g: Tensor, ends: Tensor, handle: Tensor, order: Tensor, *, transposed: bool
) -> Tensor:
    """dW [E, P, N], or [E, N, P] if transposed, from x [R, N] and g [R, P], sorted by expert.

    `ends` [E] counts the rows up to the last one of each expert.
    """
    state = layer_state.find(handle.shape[0])
    dw = experts_weight_grad(
        x,
        g,
        ends,
        state.config,
        observer=state.step_observer or state.observer,
        is_transposed=transposed,
    )
    if state.on_weight_grad is not None:
        state.on_weight_grad(dw)
    return dw


def _experts_weight_grad_fake(
    x: Tensor, g: Tensor, ends: Tensor, *_: Any, transposed: bool
) -> Tensor:
    sizes = (x.shape[1], g.shape[1]) if transposed else (g.shape[1], x.shape[1])
    return x.new_empty((ends.shape[0], *sizes))


register_operator(
    "memaop_triton::experts_weight_grad",
    _experts_weight_grad,
    _experts_weight_grad_fake,
    writes=["order"],
)


@register_flop_formula(torch.ops.memaop_triton.experts_weight_grad)
def _flops(
    x: torch.Size, g: torch.Size, ends: torch.Size, handle: torch.Size, *_: Any, **__: Any
) -> int:
    return flops_of_state(layer_state.find(handle[0]), x[0], x[1], g[1])
