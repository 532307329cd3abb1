"""The weight gradients of experts, each from those of the selected rows that were routed to it.

The rows of all experts lie in one matrix, sorted by expert: of expert e, dW_e = Σ g_m x_mᵀ over its
rows m. One selection is made over all of them, by ‖x_m‖ ‖g_m‖. So K is known beforehand, whatever
the router does, and experts with more or larger rows get more of it. A selection that is unbiased
for a sum of outer products is so for each of these sums.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from memaop_triton.backward.gathered import parts_for
from memaop_triton.backward.step import Observer, Operands, rows_and_weights
from memaop_triton.config import MemAOPConfig
from memaop_triton.kernels.cpu.torch_ops import selected_rows

# Of the operands of PyTorch's grouped product.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_ALIGNMENT_BYTES = 16


def experts_weight_grad(
    x: Tensor,
    g: Tensor,
    ends: Tensor,
    config: MemAOPConfig,
    *,
    generator: torch.Generator | None = None,
    observer: Observer | None = None,
    is_transposed: bool = False,
) -> Tensor:
    """Approximate the gradients of E weights from K of R rows.

    Args:
        x: Inputs, [R, N], floating point, sorted by expert.
        g: Gradient of the loss with respect to the outputs, [R, P], dtype and device of `x`.
        ends: Rows up to the last one of each expert, [E], int32 or int64, ascending; the last is R.
        config: What to compute, without a memory.
        generator: Source of all draws; the device's default one if `None`.
        observer: Records the step, with the matrices of all experts below each other as dW.
        is_transposed: Return each gradient as [N, P].

    Returns:
        [E, P, N] in the dtype of `x`; zeros for experts without a selected row.
    """
    (rows, n), p = x.shape, g.shape[1]
    if 0 in (rows, n, p):
        return x.new_zeros((len(ends), *((n, p) if is_transposed else (p, n))))
    if observer is not None:
        observer.begin_step(x.device)
    k = config.num_rows(rows, n, p)
    operands = Operands(x, g, config, k, generator=generator, observer=observer)
    if k == rows:
        dw = _products(x, g, ends, is_transposed)
        if observer is not None:
            observer.observe_exact(operands, dw.flatten(0, 1), None)
        return dw
    scores = operands.scores_of_rows()
    selection = parts_for(g).select(operands, scores)
    # Rows of weight 0 stay: how many there are is known on the device only.
    indices, weights = rows_and_weights(selection, config, drop=False)
    # Ascending as the rows of the experts are.
    selected_ends = torch.searchsorted(indices, ends.to(indices.dtype), out_int32=True)
    dw = _products(*selected_rows(x, g, indices, weights), selected_ends, is_transposed)
    operands.observe(selection, dw.flatten(0, 1), scores)
    return dw


def _products(x: Tensor, g: Tensor, ends: Tensor, is_transposed: bool) -> Tensor:
    """[E, P, N] of x [K, N] and g [K, P], whose groups of rows end at `ends`; or its transpose."""
    left, right = (x, g) if is_transposed else (g, x)
    if _has_grouped_product(left, right):
        return F.grouped_mm(left.t(), right, offs=ends.to(torch.int32))
    products = left.new_zeros((len(ends), left.shape[1], right.shape[1]))
    for product, (first, end) in zip(
        products, itertools.pairwise([0, *ends.tolist()]), strict=True
    ):
        if first < end:
            torch.mm(left[first:end].t(), right[first:end], out=product)
    return products


def _has_grouped_product(left: Tensor, right: Tensor) -> bool:
    """Whether PyTorch multiplies the groups in one kernel, without knowing their sizes."""
    if left.device.type != "cuda" or left.dtype != torch.bfloat16:
        return False
    is_operand = is_grouped_operand(left.dtype, left.shape[1], right.shape[1])
    return is_operand and torch.cuda.get_device_capability(left.device) >= (8, 0)


def is_grouped_operand(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether `F.grouped_mm` takes matrices whose rows have these sizes."""
    return dtype in _DTYPES and all(n * dtype.itemsize % _ALIGNMENT_BYTES == 0 for n in sizes)
