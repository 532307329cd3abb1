"""One step of each memory on any device, in PyTorch or C: score, select, multiply, update it.

`steps_triton` holds the same functions for the Triton kernels; `weight_grad` chooses between the
two. They take operands that have been checked, with K < M unless a row memory is involved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memaop_triton.backward.scores import product_of_norms
from memaop_triton.backward.step import Gradients, Operands, ProjectedRows, rows_and_weights
from memaop_triton.kernels.cpu import native_step
from memaop_triton.kernels.cpu import torch_ops as kernels
from memaop_triton.memory.kinds import ResidualMemory, SubspaceMemory
from memaop_triton.sampling.selection import Selection


def without_memory(operands: Operands, selection: Selection | None) -> Gradients:
    """dW from the selected rows; `selection` takes the place of scores."""
    x, g, config, transposed = operands.x, operands.g, operands.config, operands.is_transposed
    scores = dw = None
    if selection is None:
        by_norms = config.scores == "norms"
        step = _in_one_call(operands, x, g, transposed=transposed) if by_norms else None
        if step is not None:
            scores, selection, dw = step.scores, Selection(step.indices, step.weights), step.product
        else:
            scores = _row_scores(*operands.parts_to_score())
            selection = operands.select(operands.scores_of_whole_rows(scores))
    operands.collect_factors(x, g, selection)
    if dw is None:
        rows = rows_and_weights(selection, config)
        dw = kernels.gather_gemm(x, g, *rows, transposed=transposed)
    dw = operands.oriented(dw)
    operands.observe(selection, dw, scores)
    return Gradients(dw, operands.sum_rows())


def with_row_memory(operands: Operands, memory: ResidualMemory) -> Gradients:
    """dW from the rows selected of m ← c·σ·m + x, which are then empty."""
    x, g = operands.x, operands.g
    rows = x.shape[0]
    mx, mg, filled = memory.slots(rows, x)
    memory.follow_loss_scale()
    factor = memory.take_carry()
    memory.carry_slots_after(rows, factor)
    carry = filled.to(kernels.score_dtype(mx.dtype)) * factor
    if memory.signed:
        signs = torch.empty_like(carry).bernoulli_(0.5, generator=operands.generator)
        carry *= signs.mul_(2).sub_(1)
    transposed = operands.is_transposed
    added = native_step.Added(x, g, carry)
    step = _in_one_call(operands, mx, mg, added=added, transposed=transposed)
    if step is not None:
        scores, selection, dw = step.scores, Selection(step.indices, step.weights), step.product
        whole_scores = scores
    else:
        scores = product_of_norms(
            kernels.accumulate_and_score(mx, x, carry), kernels.accumulate_and_score(mg, g, carry)
        )
        whole_scores, dw = operands.scores_of_whole_rows(scores), None
        selection = operands.select(whole_scores)
    operands.collect_factors(mx, mg, selection)
    if dw is None:
        dw = kernels.gather_gemm(mx, mg, selection.indices, transposed=transposed)
    dw = operands.oriented(dw)
    filled.fill_(True)
    memory.empty(selection.indices, whole_scores)
    operands.observe(selection, dw, scores)
    return Gradients(dw.to(x.dtype), operands.sum_rows())


def with_subspace(
    operands: Operands, memory: SubspaceMemory, selection: Selection | None
) -> Gradients:
    """dW exact inside the memory's subspace, and from selected rows outside of it."""
    x, g, config = operands.x, operands.g, operands.config
    # With a basis of the gradients' side X and G are exchanged, and the sum is dWᵀ.
    a, b = (x, g) if memory.side == "input" else (g, x)
    basis = memory.basis_of(a)
    wants_sums = operands.bias_grad and b is g
    transposed = (a is g) != operands.is_transposed
    step = None
    if selection is None:
        step = _in_one_call(operands, a, b, basis, sums=wants_sums, transposed=transposed)
    if step is not None:
        rest, scores, z, zb = step.rest, step.scores, step.z, step.zb
        db, dw = step.sums, step.product
        selection = Selection(step.indices, step.weights)
    else:
        z, rest = kernels.project_rows(a, basis)
        zb, b_norms, db = kernels.project_gradient(b, z, bias_grad=wants_sums)
        scores, dw = product_of_norms(rest, b_norms), None
        if selection is None:
            selection = operands.select(operands.scores_of_whole_rows(scores))
    if dw is None or operands.factors is not None:
        projection = kernels.Projection(basis * kernels.basis_scale(a.shape[1]), z, zb)
        operands.collect_factors(a, b, selection, projection, exchanged=a is g)
    if dw is None:
        rows = rows_and_weights(selection, config)
        dw = kernels.gather_gemm(a, b, *rows, projection, transposed=transposed)
    dw = operands.oriented(dw)
    projected = ProjectedRows(rest, z, zb, a.shape[1]) if operands.is_observed else None
    operands.observe(selection, dw, scores, projected)
    memory.end_step(a, z)
    return Gradients(dw, operands.sum_rows() if db is None else db)


def _in_one_call(
    operands: Operands,
    a: Tensor,
    b: Tensor,
    basis: Tensor | None = None,
    added: native_step.Added | None = None,
    *,
    sums: bool = False,
    transposed: bool = False,
) -> native_step.Step | None:
    """Scores, selection and product by one call of the C code, if it can do all of that.

    The arguments are those of `native_step.run`.
    """
    policy = operands.config.selection
    is_alone = operands.shards is None and operands.config.block_rows == 1
    if not is_alone or policy not in ("priority", "topk") or operands.k == a.shape[0]:
        return None
    return native_step.run(
        a,
        b,
        operands.k,
        basis,
        added,
        draw=policy == "priority",
        sums=sums,
        transposed=transposed,
        generator=operands.generator,
    )


def _row_scores(x: Tensor | None, g: Tensor) -> Tensor:
    """The scores of the parts of X and G that are read, ‖g_m‖ without X."""
    norms = kernels.row_norms(g)
    return norms if x is None else product_of_norms(kernels.row_norms(x), norms)
