"""Products of rows that are gathered before they are multiplied, where X is no matrix.

Of inputs that are kept in a few bits, or are patches of a convolution, rows are restored or copied
by whoever knows how. What a step does besides is here, in PyTorch and C (`gathered_torch`) or by
the Triton kernels (`gathered_triton`).
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from memaop_triton import dispatch
from memaop_triton.backward import gathered_torch
from memaop_triton.backward.step import Operands
from memaop_triton.kernels.cpu.picked import Picked
from memaop_triton.kernels.cpu.torch_ops import Projection, score_dtype
from memaop_triton.sampling.selection import Selection


def parts_for(g: Tensor, rank: int = 0) -> ModuleType:
    """`gathered_torch`, or `gathered_triton`, which is imported only where it is used.

    Args:
        g: [M, P].
        rank: Of the subspace of X, if there is one.
    """
    return _triton() if dispatch.runs_triton(g, rank=rank) else gathered_torch


@functools.cache
def _triton() -> ModuleType:
    from memaop_triton.backward import gathered_triton

    return gathered_triton


def product(
    operands: Operands,
    a: Picked | Tensor,
    b: Picked | Tensor,
    weights: Tensor | None,
    projection: Projection | None = None,
    *,
    exchanged: bool = False,
    are_whole: bool = True,
) -> Tensor:
    """dW by the parts' `product`, of rows that are collected where factors are.

    Args:
        operands: Of the step.
        a: Rows of X, [K, N], or of G, [K, P], copied already or not.
        b: The same rows of the other.
        weights: [K]; `None` if all are 1.
        projection: Of the rows of `a`, if there is a subspace.
        exchanged: Whether `a` is of G.
        are_whole: Whether rows still have the part inside of the subspace. If not, z is zero.
    """
    a, b = (rows if isinstance(rows, Picked) else Picked(rows) for rows in (a, b))
    if operands.factors is not None:
        a, b = Picked(a.matrix()), Picked(b.matrix())
        like = operands.g.new_ones(a.count, dtype=score_dtype(operands.g.dtype))
        ones = like if weights is None else weights
        every = Selection(torch.arange(a.count, device=like.device), ones)
        operands.collect_factors(a.lines, b.lines, every, projection, exchanged=exchanged)
    rank = 0 if projection is None or exchanged else projection.z.shape[1]
    parts = parts_for(operands.g, rank)
    dw: Tensor = parts.product(
        operands, a, b, weights, projection, exchanged=exchanged, are_whole=are_whole
    )
    return dw
