"""The gradient of a convolution's weight, from maps of inputs and of output gradients."""

from __future__ import annotations

from torch import Tensor

from memaop_triton.backward.step import Gradients, Observer
from memaop_triton.backward.weight_grad import weight_and_bias_grad
from memaop_triton.config import MemAOPConfig
from memaop_triton.memory.kinds import Memory
from memaop_triton.memory.maps import Maps
from memaop_triton.memory.patches import Geometry, Patches


def conv_weight_grad(
    x: Tensor,
    g: Tensor,
    geometry: Geometry,
    config: MemAOPConfig,
    memory: Memory | None = None,
    *,
    bias_grad: bool = True,
    observer: Observer | None = None,
) -> Gradients:
    """Approximate dW, from K of the patches, and with `bias_grad` the exact db ([P]).

    Args:
        x: Inputs, [B, C, *sizes], floating point.
        g: Gradient of the loss with respect to the output, [B, P, *positions], dtype of `x`.
        geometry: Of the convolution.
        config: What to compute. No row memory, no stash, no cheap scores.
        memory: What `new_memory(config, N, P)` made; updated in place.
        bias_grad: Whether db is wanted too.
        observer: Takes note of the step.

    Returns:
        dW as a matrix of rows of patches, [P, N] (`as_weight` gives it the weight's shape), and db.
    """
    return weight_and_bias_grad(
        Patches(x, geometry), Maps(g), config, memory, bias_grad=bias_grad, observer=observer
    )
