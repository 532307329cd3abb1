"""What a step does besides gathering rows of X, by the Triton kernels; as `gathered_torch`.

No value is read on the host, but where a block of rows is cut short.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memaop_triton.backward import gathered_torch
from memaop_triton.backward.step import Operands, rows_and_weights
from memaop_triton.kernels.cpu.picked import Picked
from memaop_triton.kernels.cpu.torch_ops import Projection
from memaop_triton.kernels.gpu import subspace
from memaop_triton.sampling.selection import Selection


def select(operands: Operands, scores: Tensor) -> Selection:
    """K of the rows with these scores, [M]; all of them exist."""
    return operands.select(scores, cut_short=len(scores) % operands.config.block_rows > 0)


def weights_of(operands: Operands, selection: Selection) -> tuple[Tensor, Tensor | None]:
    """Rows to multiply, and weights; `None` where all are 1. Rows of weight 0 stay."""
    return rows_and_weights(selection, operands.config, drop=False)


def project_gradient(
    operands: Operands, z: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Zᵀ G [q, P] for z [M, q], ‖g_m‖·rest_m [M], and db [P] if it is required."""
    g = operands.g
    parts, scores, sums = subspace.project_gradient(g, z, rest, bias_grad=operands.bias_grad)
    return parts.sum(0).t(), scores, None if sums is None else sums.total()


def product(
    operands: Operands,
    a: Picked,
    b: Picked,
    weights: Tensor | None,
    projection: Projection | None = None,
    *,
    exchanged: bool = False,
    are_whole: bool = True,
) -> Tensor:
    """dW of picked rows, [K, N] and [K, P]; `exchanged` if `a` is of G.

    A library's GEMM takes the rows, less the part inside of a subspace if they still have it. Only
    float16, whose range weighted rows might leave, goes another way.
    """
    if weights is not None and a.lines.dtype == torch.float16:
        return gathered_torch.product(operands, a, b, weights, projection, exchanged=exchanged)
    of_a, of_b = a.matrix(), b.matrix()
    if weights is not None:
        of_b = (of_b * weights.unsqueeze(1)).to(of_b.dtype)
    if projection is None:
        return operands.product(of_a, of_b)
    expand, z, zb = projection
    zb = zb.to(of_a.dtype)
    if are_whole:
        of_a = torch.addmm(of_a, z, expand.t(), alpha=-1)
    x, g = (of_b, of_a) if exchanged else (of_a, of_b)
    inside = expand @ zb if exchanged else zb.t() @ expand.t()
    left, right = (x, g) if operands.is_transposed else (g, x)
    return operands.oriented(torch.addmm(operands.oriented(inside), left.t(), right))
