"""What PEFT has in a model, found without importing PEFT."""

from __future__ import annotations

import sys

from torch import nn


def left_to_peft(model: nn.Module) -> set[str]:
    """Names of the linear layers that PEFT has frozen or put into its own layers.

    Empty for a model without such layers. What PEFT trains as a whole (`modules_to_save`) is not
    among them.
    """
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return set()
    wrappers = [m for m in model.modules() if isinstance(m, tuners.BaseTunerLayer)]
    if not wrappers:
        return set()
    inside = {id(module) for wrapper in wrappers for module in wrapper.modules()}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {n for n, m in linears.items() if id(m) in inside or _is_frozen(m)}


def _is_frozen(layer: nn.Linear) -> bool:
    weight = layer._parameters.get("weight")  # a parametrised one would be computed
    return weight is not None and not weight.requires_grad
