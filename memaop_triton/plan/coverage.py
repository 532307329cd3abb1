"""How much of a model's weight gradients converted layers compute: `coverage`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from memaop_triton.nn.coverage import Coverage, coverage_of
from memaop_triton.plan.observing import observe


def coverage(
    model: nn.Module,
    example_inputs: object = None,
    loss_fn: Callable[[Any], Tensor] | None = None,
) -> Coverage:
    """How much of the weight gradients of `model` its converted layers compute, and what is left.

    Counted are trainable Parameters of two and more dimensions, once where modules share them. The
    table of an embedding does not count, unless a layer shares it, or the model was seen to
    multiply by it.

    Args:
        model: Any module. Without a converted layer the share is 0.
        example_inputs: What a training step hands to the model, as for `plan`. The model is then
            run forward and backward once, without an update, and FLOPs are counted: those of
            experts where tokens reach them, of a convolution at all positions, none of a weight
            that gets no gradient. A weight whose products cannot be seen, because a kernel of
            somebody else's multiplies it, is taken to meet as many rows as the others do on
            average. By default the elements of the Parameters are counted.
        loss_fn: As for `plan`.

    Returns:
        `share`, and `left` by class; `print` shows a short table.

    Raises:
        TypeError: `model` is not a module, or `example_inputs` is of another type.
        ValueError: `loss_fn` without `example_inputs`; nothing in the output can be differentiated,
            or a Parameter is divided among processes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if example_inputs is None:
        if loss_fn is not None:
            raise ValueError("loss_fn has no meaning without example_inputs: nothing is run.")
        return coverage_of(model)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):
            raise ValueError(
                f"parameter {name!r} is a DTensor, divided among processes, whose products cannot "
                "be counted here: leave out example_inputs, or call this before tensor parallelism "
                "or fully_shard divides the model."
            )
    flops = observe(model, {}, example_inputs, loss_fn, timed=0).flops
    return coverage_of(model, flops.by_id, is_estimate=flops.is_estimate)
