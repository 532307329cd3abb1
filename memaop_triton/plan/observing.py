"""One forward and backward pass of a model, to record which gradients its layers compute.

The model is the same afterwards: `untouched` restores whatever a training step changes in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from memaop_triton.auto.layer_timing import Use
from memaop_triton.auto.timing import elapsed, generators_restored
from memaop_triton.nn.conv import convolution_of
from memaop_triton.nn.coverage import trainable_weights
from memaop_triton.nn.layer_choice import Chosen, adopt_, quoted, sizes_of
from memaop_triton.nn.linear import MemAOPLayer
from memaop_triton.plan.counting import CountingProducts, WeightFlops


class Observed(NamedTuple):
    """What a training step showed.

    Attributes:
        uses: For every layer, by name, its uses and how often each occurs.
        seconds: Of a forward and backward pass of the whole model.
        has_loss: Whether its gradients were those of a loss.
        flops: Of the gradients of all trainable weights, those of other modules included.
    """

    uses: dict[str, Counter[Use]]
    seconds: float
    has_loss: bool
    flops: WeightFlops


def observe(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    example_inputs: object,
    loss_fn: Callable[[Any], Tensor] | None = None,
    timed: int = 1,
) -> Observed:
    """Run a training step without the update: once to observe, and `timed` times for the time.

    Args:
        model: In training mode; one in evaluation mode is put in training mode for this.
        layers: The layers to observe, by name.
        example_inputs: As for `plan`.
        loss_fn: As for `plan`.
        timed: The median is taken; 0 seconds if it is not timed at all.

    Raises:
        TypeError: `example_inputs` is of another type.
        ValueError: No tensor in the output can be differentiated.
    """
    uses: dict[str, Counter[Use]] = {name: Counter() for name in layers}

    def step() -> bool:
        return run_backward(model, example_inputs, loss_fn)

    weights = trainable_weights(model)
    products = CountingProducts(weights)
    with untouched(model, example_inputs):
        with contextlib.ExitStack() as stack:
            for name, layer in layers.items():
                hook = _counting(name, uses[name])
                stack.enter_context(layer.register_forward_hook(hook, with_kwargs=True))
            has_loss = run_backward(model, example_inputs, loss_fn, products)
        flops = products.of_those_with_gradients(weights)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        times = []
        for _ in range(timed):
            model.zero_grad()
            times.append(elapsed(step, device))
        return Observed(uses, statistics.median(times) if times else 0.0, has_loss, flops)


def run_backward(
    model: nn.Module,
    example_inputs: object,
    loss_fn: Callable[[Any], Tensor] | None = None,
    watching: contextlib.AbstractContextManager[Any] | None = None,
) -> bool:
    """Run a model forward and backward; the arguments and errors are those of `observe`.

    The forward pass is run inside of `watching`.

    Returns:
        Whether it was a loss whose gradients were computed: that of `loss_fn`, or one that the
        model returns. Otherwise it was the sum of all outputs.
    """
    with watching or contextlib.nullcontext():
        summed, has_loss = run_forward(model, example_inputs, loss_fn)
    torch.autograd.backward(summed, [torch.ones_like(t) for t in summed])
    return has_loss


def run_forward(
    model: nn.Module, example_inputs: object, loss_fn: Callable[[Any], Tensor] | None = None
) -> tuple[list[Tensor], bool]:
    """Run a model forward; the arguments and errors are those of `observe`.

    Returns:
        What the backward pass begins from, the loss or all outputs, and whether it is a loss.
    """
    arguments, keywords = _call_arguments(example_inputs)
    output = model(*arguments, **keywords)
    loss = _loss_of(output) if loss_fn is None else _checked(loss_fn(output))
    return (_summed(output), False) if loss is None else ([loss], True)


@contextlib.contextmanager
def converted(layers: Chosen) -> Iterator[dict[str, MemAOPLayer]]:
    """Inside, the layers are converted, each with its configuration; afterwards they are dense."""
    made: dict[str, MemAOPLayer] = {}
    try:
        for name, (linear, config) in layers.items():
            made[name] = adopt_(linear, config)
        yield made
    finally:
        for layer in made.values():
            layer.revert_()


@contextlib.contextmanager
def untouched(model: nn.Module, inputs: object = None) -> Iterator[None]:
    """Inside, `model` can be trained like any model; afterwards it is as it was before.

    Restored are values and gradients of the parameters (and of tensors among `inputs`),
    `requires_grad`, buffers, modes, and the generators of torch, NumPy and Python. Inside,
    gradients are computed eagerly and in training mode and start from `None`; optimizers that step
    in the backward pass do not run, and nothing is sent to other processes. Converted layers are
    exact and do not use their memories.

    Holds copies of the parameters and buffers until the end.

    Raises:
        ValueError: A parameter or buffer is not initialised.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(is_lazy(t) for t in tensors):
        raise ValueError("model has parameters that are not initialised: run it once first.")
    modules = list(model.modules())
    registered = [(m, m.training, m._parameters.copy(), m._buffers.copy()) for m in modules]
    copies = [t.detach().clone() for t in tensors]
    leaves = [*model.parameters(), *(t for t in _tensors(inputs) if t.is_leaf)]
    gradients = [(t, t.requires_grad, t.grad) for t in leaves]
    # The hooks that run once a gradient has been accumulated.
    followers = [(h, dict(h)) for t in leaves if (h := t._post_accumulate_grad_hooks)]
    try:
        if not model.training:
            model.train()
        for module in modules:
            if isinstance(module, MemAOPLayer):
                module.training = False  # exact: no draws, and the memory is not used
        for leaf in leaves:
            leaf.grad = None
        for hooks, _ in followers:
            hooks.clear()
        with generators_restored({t.device for t in (*tensors, *leaves)}), _training(model):
            yield
    finally:
        for module, training, parameters, buffers in registered:
            module.training = training
            for now, before in ((module._parameters, parameters), (module._buffers, buffers)):
                now.clear()
                now.update(before)  # type: ignore[arg-type]
        for tensor, copy in zip(tensors, copies, strict=True):
            if not _is_expanded(tensor):
                tensor.data.copy_(copy)
        for leaf, required, gradient in gradients:
            leaf.requires_grad_(required)
            leaf.grad = gradient
        for hooks, before_clearing in followers:
            hooks.update(before_clearing)


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Gradients on, even if the caller switched them off; compilers and communication off."""
    alone: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if isinstance(model, DistributedDataParallel):
        alone = model.no_sync()
    eager: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        eager = torch.compiler.set_stance("force_eager")
    with alone, eager, torch.inference_mode(False):  # which switches gradients on as well
        yield


def _is_expanded(a: Tensor) -> bool:
    """Whether elements share memory; PyTorch refuses to write to such a tensor."""
    if a.layout != torch.strided:
        return False
    return any(stride == 0 and size > 1 for stride, size in zip(a.stride(), a.shape, strict=True))


def _counting(name: str, uses: Counter[Use]) -> Callable[..., None]:
    """A forward hook that counts in `uses` which gradients the backward pass computes in a layer.

    Counted in the backward pass, because a forward pass may have none (a frozen part), or run twice
    (activation checkpointing).
    """

    def hook(
        layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> None:
        if not output.requires_grad:
            return
        weight: Any = layer.weight
        bias: Any = layer.bias
        if hasattr(weight, "device_mesh"):
            raise ValueError(
                f"layer {quoted(name)}: its weight is a DTensor, divided among processes. Measure "
                "the model before tensor parallelism or fully_shard divides it."
            )
        x = next(iter((*args, *kwargs.values())))  # what follows are a projection's weights
        n, p = sizes_of(layer)
        use = Use(
            output.numel() // max(1, p),
            n,
            p,
            output.dtype,
            output.device,
            weight.requires_grad,
            bias is not None and bias.requires_grad,
            x.requires_grad,
            convolution_of(layer, x) if isinstance(layer, _ConvNd) else None,
        )
        output.register_hook(lambda _: uses.update([use]))

    return hook


def _call_arguments(example_inputs: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    raise TypeError(
        "example_inputs must be a tensor, a tuple of arguments or a dictionary of keyword "
        f"arguments for the model's forward pass, got {type(example_inputs).__name__}."
    )


def _checked(loss: object) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            f"loss_fn must return a tensor of one element that requires a gradient, got {loss}."
        )
    return loss


def _loss_of(output: object) -> Tensor | None:
    """The loss that a model returns: a scalar, alone, first of several, or by the name "loss"."""
    found: object = output
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif isinstance(output, tuple | list):
        found = output[0] if output else None
    elif not isinstance(output, Tensor):
        found = getattr(output, "loss", None)
    if not isinstance(found, Tensor) or found.dim() > 0:
        return None
    return found if found.is_floating_point() and found.requires_grad else None


def _summed(output: object) -> list[Tensor]:
    """Tensors of an output without a loss, whose sum stands for one."""
    summed = [t for t in _tensors(output) if t.is_floating_point() and t.requires_grad]
    if not summed:
        raise ValueError(
            "example_inputs lead to no floating-point tensor that requires a gradient in the "
            f"model's output, a {type(output).__name__}: pass loss_fn, which makes a scalar of it."
        )
    return summed


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, dictionaries and dataclasses."""
    parts: Any = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, tuple | list):
        parts = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = (getattr(value, field.name) for field in dataclasses.fields(value))
    for part in parts:
        yield from _tensors(part)
