"""The gradient of a convolution's weight, from maps of inputs and of output gradients."""

from __future__ import annotations

from torch import Tensor

from memaop_triton.backward.scores import product_of_norms
from memaop_triton.backward.step import Gradients, Observer, rows_and_weights
from memaop_triton.backward.weight_grad import weight_and_bias_grad
from memaop_triton.config import MemAOPConfig
from memaop_triton.dispatch import runs_triton
from memaop_triton.kernels.cpu import torch_ops as kernels
from memaop_triton.memory.kinds import Memory
from memaop_triton.memory.maps import Maps
from memaop_triton.memory.patches import Geometry, Patches, by_position
from memaop_triton.sampling.selection import cut, select


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
    patches = Patches(x, geometry)
    if memory is None and observer is None and not geometry.is_pointwise and g.numel():
        found = _without_matrix(patches, Maps(g), config, bias_grad=bias_grad)
        if found is not None:
            return found
    return weight_and_bias_grad(
        patches, by_position(g), config, memory, bias_grad=bias_grad, observer=observer
    )


def _without_matrix(
    patches: Patches, maps: Maps, config: MemAOPConfig, *, bias_grad: bool
) -> Gradients | None:
    """The same without G in the order of rows; `None` if that is no faster."""
    rows, n = patches.shape
    k = config.num_rows(rows, n, maps.shape[1])
    if k == rows:
        dw = patches.product_with(maps.gradients)
        return Gradients(dw, maps.sum_rows() if bias_grad else None)
    if patches.groups > 1 or runs_triton(maps.gradients):
        return None
    norms = maps.norms()
    if norms is None:
        return None
    selection = cut(select(product_of_norms(patches.norms(), norms), config, k), rows)
    indices, weights = rows_and_weights(selection, config)
    dw = kernels.product(patches.picked(indices), maps.picked(indices), weights)
    return Gradients(dw, maps.sum_rows() if bias_grad else None)
