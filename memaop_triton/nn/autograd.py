"""What the autograd functions of all layers share."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from memaop_triton.nn.layer_state import LayerState

_BATCHED = (
    "a converted layer in training draws rows for each backward pass, so it cannot be batched by "
    "torch.func.vmap, torch.func.jacrev, torch.autograd.functional.jacobian(vectorize=True) or "
    "torch.autograd.grad(is_grads_batched=True): call .eval() on the layer, which makes its "
    "gradients exact, or revert_ it."
)


class LayerFunction(torch.autograd.Function):
    """Of a converted layer: no transform can batch it."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        """Refuse."""
        raise RuntimeError(_BATCHED)


F = TypeVar("F", bound=type[torch.autograd.Function])


def caches_signature(function: F) -> F:
    """Decorates a class whose `apply` would look up the signature of `forward` for 20 µs a call."""
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function


def check_not_batched(grad_output: Tensor) -> None:
    """Refuse many gradients in one tensor, as `torch.autograd.grad(is_grads_batched=True)` has."""
    if not torch.compiler.is_compiling():
        batching = torch._C._functorch
        if batching.is_batchedtensor(grad_output) or batching.is_legacy_batchedtensor(grad_output):
            raise RuntimeError(_BATCHED)


class _DifferentiableOnce(torch.autograd.Function):
    """A gradient as it is, still linked to what it was made of, so that a second one is refused.

    Without the link autograd would return zero for a second derivative.
    """

    @staticmethod
    def forward(gradient: Tensor, *sources: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the gradient of a converted layer cannot be differentiated again, because it is "
            "computed from part of the rows: call .eval() on the layer, which makes it exact, or "
            "revert_ it."
        )


def gradients_once(
    grad_output: Tensor,
    sources: tuple[Tensor | None, ...],
    compute: Callable[[], tuple[Tensor | None, ...]],
) -> tuple[Tensor | None, ...]:
    """Gradients as `compute` returns them, linked to `sources` where a graph of them is made.

    Casts were made in the forward pass, in whichever autocast region backward is called.
    """
    device = grad_output.device.type
    if torch.is_grad_enabled() or is_autocast(device):
        with torch.no_grad(), no_autocast(device):
            gradients = compute()
    else:
        gradients = compute()
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return tuple(
            None if a is None else _DifferentiableOnce.apply(a, grad_output, *sources)
            for a in gradients
        )
    return gradients


def wanted_gradients(ctx: Any) -> tuple[bool, bool, bool]:
    """Whether this backward pass delivers the gradients of x, weight and bias.

    `needs_input_grad` lists which inputs require a gradient. The engine delivers fewer of these
    where `torch.autograd.grad` names some inputs, or where a pipeline schedule computes the
    gradients of inputs and weights in two passes.
    """
    needed: tuple[bool, bool, bool] = ctx.needs_input_grad[:3]
    if torch.compiler.is_compiling():  # a compiled backward pass is one piece
        return needed
    (x, _), (weight, _), (bias, _), *_ = ctx.next_functions
    return (
        needed[0] and _is_delivered(x),
        needed[1] and _is_delivered(weight),
        needed[2] and _is_delivered(bias),
    )


def _is_delivered(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient is returned, or no engine is running
        return True


def is_transformed() -> bool:
    """Whether a transform of `torch.func` is under way."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def handle_and_order(state: LayerState, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of a state, on a device."""
    handle, order = state.handle, state.order
    if handle.device != device:
        if torch.compiler.is_compiling():
            return handle.to(device), order.to(device)
        state.move(device)
        handle, order = state.handle, state.order
    return handle, order


def no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Switches autocast off for a type of device, if it is on."""
    return (
        torch.autocast(device, enabled=False) if is_autocast(device) else contextlib.nullcontext()
    )


def is_autocast(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast(a: Tensor) -> Tensor:
    """What autocast makes of an operand of a linear layer: float64 and integers stay."""
    eligible = a.is_floating_point() and a.dtype != torch.float64
    return a.to(torch.get_autocast_dtype(a.device.type)) if eligible else a
