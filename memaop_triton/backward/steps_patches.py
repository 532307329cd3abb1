"""One step of each memory of a convolution, whose rows are `Patches`.

Rows are scored without being made, and only those that are selected are gathered. What takes all
of them is a convolution again: by all of G, or by the few columns of a subspace.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memaop_triton.backward.gathered import beside_gradients, parts_for, product
from memaop_triton.backward.step import Gradients, Operands, ProjectedRows
from memaop_triton.kernels.cpu.torch_ops import Projection, basis_scale
from memaop_triton.memory.kinds import Memory, SubspaceMemory
from memaop_triton.memory.maps import Maps
from memaop_triton.memory.patches import Patches


def exact(operands: Operands) -> Gradients:
    """dW from all rows."""
    dw = _patches_of(operands).product_with(_maps_of(operands).gradients)
    return Gradients(dw, operands.sum_rows())


def sampled(operands: Operands, memory: Memory | None) -> Gradients:
    """dW from selected rows, and from all of them inside of a subspace, if there is one."""
    assert memory is None or isinstance(memory, SubspaceMemory)
    if memory is None or not memory.rank:
        gradients = _without_subspace(operands)
        if memory is not None:
            memory.end_step(_maps_of(operands))
        return gradients
    beside = _beside_inputs if memory.side == "input" else beside_gradients
    return beside(operands, memory)


def _without_subspace(operands: Operands) -> Gradients:
    patches, maps, parts = _patches_of(operands), _maps_of(operands), parts_for(operands.like_g)
    scores = patches.scores(maps)
    selection = parts.select(operands, scores)
    indices, weights = parts.weights_of(operands, selection)
    if patches.groups == 1:
        dw = product(operands, patches.picked(indices), maps.picked(indices), weights)
    else:
        dw = _product_of_groups(patches.rows(indices), maps.picked(indices).matrix(), weights)
    operands.observe(selection, dw, scores)
    return Gradients(dw, operands.sum_rows())


def _beside_inputs(operands: Operands, memory: SubspaceMemory) -> Gradients:
    patches, parts = _patches_of(operands), parts_for(operands.like_g, memory.rank)
    basis = memory.basis_of(operands.like_g)
    z, rest = patches.project(basis)
    zg, scores, db = parts.project_gradient(operands, z, rest)
    selection = parts.select(operands, scores)
    indices, weights = parts.weights_of(operands, selection)
    expand = basis * basis_scale(patches.shape[1])
    projection = Projection(expand, z.index_select(0, indices), zg)
    rows = patches.picked(indices), operands.pick_gradients(indices)
    dw = product(operands, *rows, weights, projection)
    projected = ProjectedRows(rest, z, zg, patches.shape[1]) if operands.is_observed else None
    operands.observe(selection, dw, scores, projected)
    memory.end_step(patches)
    return Gradients(dw, db)


def _product_of_groups(rows: Tensor, g: Tensor, weights: Tensor | None) -> Tensor:
    """dW [P, N] from rows [groups, K, N] and g [K, P]."""
    if weights is not None:
        # A weighted gradient may leave float16's range where the outer product does not.
        root = weights.sqrt().unsqueeze(1)
        rows, g = (rows * root).to(rows.dtype), (g * root).to(g.dtype)
    of_groups = g.unflatten(1, (len(rows), -1)).permute(1, 2, 0)
    return torch.bmm(of_groups, rows).flatten(0, 1)


def _patches_of(operands: Operands) -> Patches:
    assert isinstance(operands.inputs, Patches)
    return operands.inputs


def _maps_of(operands: Operands) -> Maps:
    assert isinstance(operands.gradients, Maps)
    return operands.gradients
