"""The backward passes as operators, `torch.ops.memaop_triton.*`, for compilers and FLOP counters.

Each takes the handle of a `LayerState`, whose memory it reads and updates, and declares that it
writes to `order`: a compiler that reorders a program keeps these operators in sequence, so a
compiled step draws the same numbers as an eager one. A gradient that is not required is returned
with shape [0].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memaop_triton.backward.input_grad import (
    flops_of_input_grad,
    input_grad_with_subspace,
    projected_input_grad,
    sampled_input_grad,
    select_for_both,
)
from memaop_triton.backward.step import Gradients
from memaop_triton.backward.weight_grad import weight_and_bias_grad
from memaop_triton.flops import weight_grad_flops
from memaop_triton.memory.kinds import SubspaceMemory, rows_to_compute
from memaop_triton.nn import layer_state
from memaop_triton.nn.layer_state import LayerState
from memaop_triton.sampling.selection import Selection

# Unsafe in the CUDA graphs that Inductor cuts a program into, because the operators keep tensors
# from one step to the next: it runs them between two graphs, as in eager mode.
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    torch.Tag.nondeterministic_seeded,
    torch.Tag.cudagraph_unsafe,
)


def _weight_grad(
    x: Tensor, g: Tensor, handle: Tensor, order: Tensor, *, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    """dW [P, N] and db [P] from x [M, N] and g [M, P], as configured in `handle`'s state."""
    state = layer_state.find(handle.shape[0])
    dw, db = _gradients(state, x, g, bias_grad)
    return dw, g.new_empty(0) if db is None else db


def _gradients(
    state: LayerState, x: Tensor, g: Tensor, bias_grad: bool, selection: Selection | None = None
) -> Gradients:
    gradients = weight_and_bias_grad(
        x,
        g,
        state.config,
        state.memory,
        bias_grad=bias_grad,
        selection=selection,
        shards=state.shards,
        factors=state.factors,
        observer=state.step_observer or state.observer,
    )
    if state.on_weight_grad is not None:
        state.on_weight_grad(gradients.weight)
    return gradients


def _weight_grad_fake(x: Tensor, g: Tensor, *_: Any, bias_grad: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty((g.shape[1], x.shape[1])), g.new_empty(g.shape[1] if bias_grad else 0)


def _sampled_backward(
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    handle: Tensor,
    order: Tensor,
    *,
    weight_grad: bool,
    bias_grad: bool,
    is_frozen: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dX [M, N], sampled or projected, dW [P, N] and db [P] from x [M, N] and g [M, P].

    Sampled from the same rows, unless a subspace memory gives each scores of its own. `x` may have
    shape [0] if no weight gradient is required. With a frozen weight there is no step of dW, so
    that of dX advances the memory.
    """
    state = layer_state.find(handle.shape[0])
    config, memory = state.config, state.memory
    selection = dx = None
    is_empty = g.numel() == 0 or weight.numel() == 0
    k = 0 if is_empty else rows_to_compute(config, memory, len(g), weight.shape[1], g.shape[1])
    if is_empty or k == len(g):
        dx = g @ weight
    elif not isinstance(memory, SubspaceMemory):
        selection = select_for_both(x if weight_grad else None, g, config, k, shards=state.shards)
        dx = sampled_input_grad(g, weight, selection, config)
    dw, db = x.new_empty(0), None
    if weight_grad:
        dw, db = _gradients(state, x, g, bias_grad, selection)
    elif bias_grad:
        db = g.sum(0)
    if dx is None:
        # After dW, whose step makes the bases and chooses among them.
        assert isinstance(memory, SubspaceMemory)
        if config.projected is not None:
            dx = projected_input_grad(g, weight, config, memory)
        else:
            dx = input_grad_with_subspace(
                g, weight, config, memory, shards=state.shards, is_alone=is_frozen
            )
    return dx, dw, g.new_empty(0) if db is None else db


def _sampled_backward_fake(
    x: Tensor, g: Tensor, weight: Tensor, *_: Any, weight_grad: bool, bias_grad: bool, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dx = g.new_empty((g.shape[0], weight.shape[1]))
    dw = x.new_empty((g.shape[1], x.shape[1]) if weight_grad else 0)
    return dx, dw, g.new_empty(g.shape[1] if bias_grad else 0)


for _name, _compute, _fake in (
    ("memaop_triton::weight_grad", _weight_grad, _weight_grad_fake),
    ("memaop_triton::sampled_backward", _sampled_backward, _sampled_backward_fake),
):
    _schema = torch.library.infer_schema(_compute, mutates_args=("order",))
    torch.library.define(_name, _schema, tags=_TAGS)
    torch.library.impl(_name, "CompositeExplicitAutograd", _compute)
    torch.library.register_fake(_name, _fake)


# What `FlopCounterMode` reports: products of matrices, as for PyTorch's own operators.


@register_flop_formula(torch.ops.memaop_triton.weight_grad)
def _flops_of_weight_grad(
    x: torch.Size, g: torch.Size, handle: torch.Size, *_: Any, **__: Any
) -> int:
    (m, n), p = x, g[1]
    state = layer_state.find(handle[0])
    k = rows_to_compute(state.config, state.memory, m, n, p)
    subspace = state.memory.cost if isinstance(state.memory, SubspaceMemory) else None
    return weight_grad_flops(m, n, p, k, subspace, state.config.numbers_scored(n, p))


@register_flop_formula(torch.ops.memaop_triton.sampled_backward)
def _flops_of_sampled_backward(
    x: torch.Size,
    g: torch.Size,
    weight: torch.Size,
    handle: torch.Size,
    *_: Any,
    weight_grad: bool,
    **__: Any,
) -> int:
    (m, p), n = g, weight[1]
    state = layer_state.find(handle[0])
    dx = flops_of_input_grad(state.config, state.memory, m, n, p)
    return dx + (_flops_of_weight_grad(x, g, handle) if weight_grad else 0)
