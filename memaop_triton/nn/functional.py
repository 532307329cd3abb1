"""The functional form `memaop_linear`, and its place in autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memaop_triton.config import MemAOPConfig
from memaop_triton.memory.kinds import Memory, check_memory
from memaop_triton.nn import ops as ops  # registers torch.ops.memaop_triton
from memaop_triton.nn.autograd import (
    LayerFunction,
    autocast,
    caches_signature,
    check_not_batched,
    gradients_once,
    handle_and_order,
    is_autocast,
    is_transformed,
    wanted_gradients,
)
from memaop_triton.nn.layer_state import LayerState, state_for
from memaop_triton.nn.stashing import kept_of, skip_draw


@caches_signature
class _MemAOPLinearFunction(LayerFunction):
    """y = x Wᵀ + b, with the approximate backward pass; touches the memory in backward only."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        handle: Tensor,
        order: Tensor,
        state: LayerState,
        memory: Memory | None,
        *kept: Tensor,
    ) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None) -> None:
        x, weight, _, handle, order, state, memory, *kept = inputs
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        # Out of the saved tensors: a graph writes to `order` between the backward passes of a layer
        # that is used twice. State and memory are kept alive.
        ctx.handle, ctx.order, ctx.state, ctx.memory = handle, order, state, memory
        ctx.approximates_dx = needs_x and state.config.grad_input is not None
        x = x if needs_weight and not kept else None
        ctx.save_for_backward(x, weight if needs_x else None, *kept)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *kept = ctx.saved_tensors
        if kept and ctx.needs_input_grad[0]:
            _check_not_differentiated()
        gradients = gradients_once(
            grad_output, (x, weight), lambda: _backward(ctx, grad_output, x, weight, kept)
        )
        return *gradients, None, None, None, None, *(None for _ in kept)


class _EagerFunction(_MemAOPLinearFunction):
    """The same with both steps of the forward pass in one, which no transform could take apart.

    PyTorch binds the arguments of a function in two steps anew in every call, which takes 10 µs.
    """

    setup_context = staticmethod(torch.autograd.Function.setup_context)

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _MemAOPLinearFunction.setup_context(ctx, inputs, None)
        return F.linear(*inputs[:3])


def _check_not_differentiated() -> None:
    """Refuse `create_graph=True` where nothing is left that would link a gradient to the inputs."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "create_graph=True asks for gradients that can be differentiated by the inputs of a "
            "converted layer, but it keeps none of them: use stash='exact', or call .eval() on the "
            "layer."
        )


def _backward(
    ctx: Any, grad_output: Tensor, x: Tensor | None, weight: Tensor | None, kept: list[Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    check_not_batched(grad_output)
    wants_x, wants_weight, wants_bias = wanted_gradients(ctx)
    g = _as_rows(grad_output)
    rows = _as_rows(x) if x is not None and wants_weight else g.new_empty(0)
    kept = kept if wants_weight else []
    dx = dw = db = None
    if wants_x and ctx.approximates_dx:
        dx, dw, db = torch.ops.memaop_triton.sampled_backward(
            rows,
            kept,
            g,
            weight,
            ctx.handle,
            ctx.order,
            weight_grad=wants_weight,
            bias_grad=wants_bias,
            is_frozen=not ctx.needs_input_grad[1],
            transposed=ctx.state.is_transposed,
        )
    else:
        if wants_x and weight is not None:
            dx = g @ weight
        if wants_weight:
            dw, db = torch.ops.memaop_triton.weight_grad(
                rows,
                kept,
                g,
                ctx.handle,
                ctx.order,
                bias_grad=wants_bias,
                transposed=ctx.state.is_transposed,
            )
        elif wants_bias:
            db = g.sum(0)
    if dx is not None and grad_output.dim() != 2:
        dx = dx.reshape(*grad_output.shape[:-1], dx.shape[-1])
    return dx, dw if wants_weight else None, db if wants_bias else None


def _as_rows(a: Tensor) -> Tensor:
    """[..., N] as a matrix of rows."""
    if a.dim() == 2:
        return a
    return a.unsqueeze(0) if a.dim() == 1 else a.flatten(0, -2)


def memaop_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: MemAOPConfig,
    memory: Memory | None = None,
) -> Tensor:
    """`torch.nn.functional.linear` with an approximate weight gradient (and input gradient).

    The result and the bias gradient are exact. The weight gradient is computed from K of the M rows
    of `x` as `config` says, and likewise the input gradient with `grad_input="sampled"`; with
    `"projected"` its rows are taken to lie in a subspace. Every draw comes from the default
    generator of the tensors' device.

    Args:
        x: [..., N], any floating dtype. The leading dimensions make M rows.
        weight: [P, N], dtype of `x`.
        bias: [P] or `None`.
        config: What to compute in the backward pass.
        memory: What `new_memory(config, N, P)` made for this weight, updated by each backward pass.
            `None` for `memory="none"`.

    Returns:
        [..., P]. Under autocast the operands are cast as for any linear layer. Differentiable once,
        and not under `torch.func.vmap`. A backward pass computes the gradients that autograd
        requires, and updates the memory only if the weight gradient is among them.

    Raises:
        TypeError: `x` is not floating point, or the dtypes differ.
        ValueError: The shapes do not fit, or `memory` is not of the kind that `config` specifies.
    """
    operands = prepared(x, weight, bias)
    check_memory(config, memory, weight.shape[1], weight.shape[0])
    return linear_of_state(*operands, state_for(config, memory, operands[0].device), memory, x)


def prepared(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands checked, and cast under autocast."""
    device = x.device.type
    if is_autocast(device):
        x, weight = autocast(x), autocast(weight)
        bias = None if bias is None else autocast(bias)
    _check_operands(x, weight, bias)
    return x, weight, bias


def linear_of_state(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: LayerState,
    memory: Memory | None = None,
    source: Tensor | None = None,
) -> Tensor:
    """`memaop_linear` for operands that have been checked and a layer's state.

    `memory` is that of a state which does not keep it alive. `source` is what the layer was given,
    if `x` was cast since.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        if state.stash != "exact" and weight.requires_grad and not torch.compiler.is_compiling():
            skip_draw(x.device)
        return F.linear(x, weight, bias)
    handle, order = handle_and_order(state, x.device)
    is_compiling = torch.compiler.is_compiling()
    transforms = is_transformed()
    kept: tuple[Tensor, ...] = ()
    # A transform differentiates gradients by the inputs, whether it uses that or not.
    if state.stash != "exact" and weight.requires_grad and not transforms:
        if is_compiling:
            # Each for itself: draws cannot be shared between operators of a graph.
            rows, out_features = _as_rows(x.detach()), weight.shape[0]
            kept = torch.ops.memaop_triton.stash(rows, handle, out_features=out_features)
        else:
            kept = kept_of(x, x if source is None else source, weight, state)
    function = _MemAOPLinearFunction if is_compiling or transforms else _EagerFunction
    result: Tensor = function.apply(x, weight, bias, handle, order, state, memory, *kept)
    return result


def _check_operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if not x.is_floating_point():
        raise TypeError(
            f"x must be of a floating-point dtype, got {x.dtype}: convert it, x.to({weight.dtype})."
        )
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out_features, in_features], got {tuple(weight.shape)}.")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but weight {tuple(weight.shape)} needs rows of "
            f"{weight.shape[1]} inputs as the last dimension."
        )
    if x.dtype != weight.dtype:
        raise TypeError(
            f"x is {x.dtype} but weight is {weight.dtype}: convert one, or use torch.autocast."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, weight needs ({weight.shape[0]},).")
