"""What PEFT has in a model, found without importing PEFT."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from torch import nn

from memaop_triton.nn.packed import weight_parameter_of


def left_to_peft(model: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    """Names of those layers of a model that PEFT has frozen or put into its own layers.

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
    return {n for n, m in layers.items() if id(m) in inside or _is_frozen(m)}


def _is_frozen(layer: nn.Module) -> bool:
    weight = weight_parameter_of(layer)
    return weight is not None and not weight.requires_grad
