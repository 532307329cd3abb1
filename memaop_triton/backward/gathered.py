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
from memaop_triton.backward.scores import product_of_norms
from memaop_triton.backward.step import Gradients, Operands, ProjectedRows
from memaop_triton.kernels.cpu.picked import Picked
from memaop_triton.kernels.cpu.torch_ops import Projection, basis_scale, score_dtype
from memaop_triton.memory.kinds import SubspaceMemory
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
    a: Picked,
    b: Picked,
    weights: Tensor | None,
    projection: Projection | None = None,
    *,
    exchanged: bool = False,
    are_whole: bool = True,
) -> Tensor:
    """dW by the parts' `product`, of rows that are collected where factors are.

    Args:
        operands: Of the step.
        a: Rows of X, [K, N], or of G, [K, P].
        b: The same rows of the other.
        weights: [K]; `None` if all are 1.
        projection: Of the rows of `a`, if there is a subspace.
        exchanged: Whether `a` is of G.
        are_whole: Whether rows still have the part inside of the subspace. If not, z is zero.
    """
    if operands.factors is not None:
        a, b = Picked(a.matrix()), Picked(b.matrix())
        like = operands.like_g.new_ones(a.count, dtype=score_dtype(operands.like_g.dtype))
        ones = like if weights is None else weights
        every = Selection(torch.arange(a.count, device=like.device), ones)
        operands.collect_factors(a.lines, b.lines, every, projection, exchanged=exchanged)
    rank = 0 if projection is None or exchanged else projection.z.shape[1]
    parts = parts_for(operands.like_g, rank)
    dw: Tensor = parts.product(
        operands, a, b, weights, projection, exchanged=exchanged, are_whole=are_whole
    )
    return dw


def beside_gradients(
    operands: Operands, memory: SubspaceMemory, selection: Selection | None = None
) -> Gradients:
    """A step beside a subspace of the gradients' side, which takes every row of X.

    `selection` takes the place of scores.
    """
    x, like, parts = operands.inputs, operands.like_g, parts_for(operands.like_g)
    assert not isinstance(x, Tensor)
    basis, columns = memory.basis_of(like), operands.gradients.shape[1]
    z, rest = operands.project_gradients(basis)
    scores = product_of_norms(rest, x.norms())
    zx = x.transposed_mm(z).to(score_dtype(like.dtype))
    if selection is None:
        selection = parts.select(operands, operands.scores_of_whole_rows(scores))
    indices, weights = parts.weights_of(operands, selection)
    expand = basis * basis_scale(columns)
    projection = Projection(expand, z.index_select(0, indices), zx)
    rows = operands.pick_gradients(indices), x.picked(indices)
    dw = product(operands, *rows, weights, projection, exchanged=True)
    projected = ProjectedRows(rest, z, zx, columns) if operands.is_observed else None
    operands.observe(selection, dw, scores, projected)
    memory.end_step(operands.gradients, z)
    return Gradients(dw, operands.sum_rows())
