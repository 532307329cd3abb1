"""What a step does besides gathering rows of X, in PyTorch or C; as in `gathered_triton`."""

from __future__ import annotations

from torch import Tensor

from memaop_triton.backward.scores import product_of_norms
from memaop_triton.backward.step import Operands, rows_and_weights
from memaop_triton.kernels.cpu import torch_ops as kernels
from memaop_triton.kernels.cpu.picked import Picked
from memaop_triton.kernels.cpu.torch_ops import Projection
from memaop_triton.sampling.selection import Selection


def select(operands: Operands, scores: Tensor) -> Selection:
    """K of the rows with these scores, [M]."""
    return operands.select(scores)


def weights_of(operands: Operands, selection: Selection) -> tuple[Tensor, Tensor | None]:
    """Rows to multiply, and weights; `None` where all are 1."""
    return rows_and_weights(selection, operands.config)


def project_gradient(
    operands: Operands, z: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Zᵀ G [q, P] for z [M, q], ‖g_m‖·rest_m [M], and db [P] if it is required."""
    zg, norms, db = kernels.project_gradient(operands.g, z, bias_grad=operands.bias_grad)
    return zg, product_of_norms(norms, rest), db


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

    Of rows that are not whole, what is left is taken as it is: z is zero then.
    """
    transposed = exchanged != operands.is_transposed
    dw = kernels.product(a, b, weights, projection, transposed=transposed)
    return operands.oriented(dw)
