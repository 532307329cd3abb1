"""One step of each memory whose inputs are kept as a `Stash`.

Rows are scored by their stored norms, and only those that are selected are restored. `exact` and a
subspace of the gradients' side take all of them, some at a time.
"""

from __future__ import annotations

from types import ModuleType

from memaop_triton import dispatch
from memaop_triton.backward.gathered import beside_gradients, parts_for, product
from memaop_triton.backward.scores import parts_to_score, product_of_norms
from memaop_triton.backward.step import Gradients, Operands, ProjectedRows
from memaop_triton.kernels.cpu.torch_ops import Projection
from memaop_triton.memory.kinds import Memory, SubspaceMemory
from memaop_triton.memory.stash import Stash
from memaop_triton.sampling.selection import Selection


def exact(operands: Operands) -> Gradients:
    """dW from all rows."""
    stash, g = _stash_of(operands), operands.g
    dw = stash.transposed_mm(g, transposed=operands.is_transposed).to(g.dtype)
    return Gradients(operands.oriented(dw), operands.sum_rows())


def sampled(operands: Operands, memory: Memory | None, selection: Selection | None) -> Gradients:
    """dW from selected rows, and from all of them inside of a subspace, if there is one.

    With a subspace of the inputs' side, that is the one whose part was kept, whatever the memory
    holds by now. `selection` takes the place of scores where there is none.
    """
    assert memory is None or isinstance(memory, SubspaceMemory)
    stash, g = _stash_of(operands), operands.g
    if memory is not None and memory.side == "grad" and memory.rank:
        return beside_gradients(operands, memory, selection)
    if stash.inside is not None:
        gradients = _beside_inputs(operands, selection)
    else:
        gradients = _without_subspace(operands, selection)
    if memory is not None:
        memory.end_step(stash if memory.side == "input" else g)
    return gradients


def _without_subspace(operands: Operands, selection: Selection | None) -> Gradients:
    stash, g, config, parts = _stash_of(operands), operands.g, operands.config, _parts_for(operands)
    scores = None
    if selection is None:
        read = parts_to_score(config.scores, g, g, operands.generator)[1]
        norms = dispatch.row_norms(read)
        scores = norms if config.scores == "grad" else product_of_norms(norms, stash.rest_norms)
        selection = parts.select(operands, operands.scores_of_whole_rows(scores))
    indices, weights = parts.weights_of(operands, selection)
    dw = product(operands, *stash.rest_and_rows_of(g, indices, weights))
    operands.observe(selection, dw, scores)
    return Gradients(dw, operands.sum_rows())


def _beside_inputs(operands: Operands, selection: Selection | None) -> Gradients:
    stash, g, parts = _stash_of(operands), operands.g, _parts_for(operands)
    assert stash.inside is not None
    z, rest = stash.inside.z.to(g.dtype), stash.rest_norms
    zg, scores, db = parts.project_gradient(operands, z, rest)
    if selection is None:
        selection = parts.select(operands, operands.scores_of_whole_rows(scores))
    indices, weights = parts.weights_of(operands, selection)
    # What was stored has no part inside any more, so nothing is taken from it.
    expand = stash.inside.expand.t().to(g.dtype)
    projection = Projection(expand, z.new_zeros((len(indices), z.shape[1])), zg)
    dw = product(
        operands, *stash.rest_and_rows_of(g, indices, weights), projection, are_whole=False
    )
    projected = ProjectedRows(rest, z, zg, stash.shape[1]) if operands.is_observed else None
    operands.observe(selection, dw, scores, projected)
    return Gradients(dw, db)


def _parts_for(operands: Operands) -> ModuleType:
    stash = _stash_of(operands)
    return parts_for(operands.g, 0 if stash.inside is None else stash.inside.z.shape[1])


def _stash_of(operands: Operands) -> Stash:
    assert isinstance(operands.inputs, Stash)
    return operands.inputs
