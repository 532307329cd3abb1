"""One step of each memory by the Triton kernels: no host synchronisation, fixed shapes.

The functions are those of `steps_torch`. What differs is that no value is read on the host: the
rows of weight 0 that give `bernoulli` a fixed size are not read but are multiplied, as zeros, and
if M is no multiple of the block size, the last block keeps its indices beyond M, which the kernels
skip.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memaop_triton.backward.step import Gradients, Operands, ProjectedRows, rows_and_weights
from memaop_triton.config import MemAOPConfig
from memaop_triton.kernels import targets
from memaop_triton.kernels.cpu.torch_ops import Projection, basis_scale
from memaop_triton.kernels.gpu import residual_gemm, score, subspace
from memaop_triton.kernels.gpu.gather_gemm import gather_gemm
from memaop_triton.memory.kinds import ResidualMemory, SubspaceMemory
from memaop_triton.selection import Selection


def without_memory(operands: Operands, selection: Selection | None) -> Gradients:
    """Score, select, multiply: 1 + K/M passes over X and G."""
    x, g, config = operands.x, operands.g, operands.config
    scores = None
    if selection is None:
        parts = operands.parts_to_score(whole_grad=operands.bias_grad)
        scores, db = score.row_scores(*parts, bias_grad=operands.bias_grad)
        selection = operands.select(operands.scores_of_whole_rows(scores), cut_short=False)
    else:
        db = operands.sum_rows()
    indices, weights = rows_and_weights(selection, config, drop=False)
    operands.collect_factors(x, g, selection)
    dw = gather_gemm(
        x, g, indices, weights, block_rows=config.block_rows, is_padded=_is_padded(config)
    )
    operands.observe(selection, dw, scores)
    return Gradients(dw, db)


def with_row_memory(operands: Operands, memory: ResidualMemory) -> Gradients:
    """The memory's update scores what it stores: 3 + K/M passes; `randk` needs no scores: 3 − K/M.

    That holds with all slots filled; an empty one is not read. Where the factors of dW are
    collected, `randk` takes the first way too: the second adds the memory to the selected rows
    while multiplying them, and their sums are not materialised.
    """
    x, config = operands.x, operands.config
    slots = memory.slots(x.shape[0], x)
    memory.follow_loss_scale()
    factor = memory.take_carry()
    memory.carry_slots_after(x.shape[0], factor)
    if isinstance(factor, Tensor):
        carry = factor.to(x.device, torch.float32).reshape(1)
    else:
        carry = torch.full((1,), factor, dtype=torch.float32, device=x.device)
    # A draw like any other: a run resumed with the generator's state repeats it.
    seed = torch.randint(1 << 62, (1,), device=x.device, generator=operands.generator)
    update = _Update(slots, carry, seed, memory.signed)
    if config.selection == "randk" and operands.factors is None:
        return _with_unscored_rows(operands, update)
    return _with_scored_rows(operands, update)


class _Update(NamedTuple):
    """What a row memory's update m ← c·σ·m + x takes besides the rows.

    Attributes:
        slots: mX, mG and the flags of the filled slots.
        carry: c, float32 [1].
        seed: Of σ and of the rounding, int64 [1].
        signed: Whether σ is drawn.
    """

    slots: tuple[Tensor, Tensor, Tensor]
    carry: Tensor
    seed: Tensor
    signed: bool


def _with_scored_rows(operands: Operands, update: _Update) -> Gradients:
    """Update every slot, select by the norms of what is stored, multiply what is stored."""
    x, g, config = operands.x, operands.g, operands.config
    mx, mg, filled = update.slots
    scores, db = score.accumulate_and_score(
        update.slots,
        x,
        g,
        update.carry,
        update.seed,
        signed=update.signed,
        bias_grad=operands.bias_grad,
    )
    selection = operands.select(operands.scores_of_whole_rows(scores), cut_short=False)
    dw = gather_gemm(
        mx,
        mg,
        selection.indices,
        block_rows=config.block_rows,
        out=torch.empty((g.shape[1], x.shape[1]), dtype=x.dtype, device=x.device),
        input_precision=_precision(x, mx),
    )
    filled.index_fill_(0, _existing(selection, x.shape[0]), False)
    operands.collect_factors(mx, mg, selection)
    operands.observe(selection, dw, scores)
    return Gradients(dw, db)


def _with_unscored_rows(operands: Operands, update: _Update) -> Gradients:
    """Select without scores, update the other slots, multiply the selected rows added to theirs."""
    x, g, config = operands.x, operands.g, operands.config
    rows = x.shape[0]
    mx, mg, filled = update.slots
    unscored = torch.zeros(rows, dtype=torch.float32, device=x.device)
    selection = operands.select(unscored, cut_short=False)
    existing = _existing(selection, rows)
    taken = torch.zeros(rows, dtype=torch.bool, device=x.device).index_fill_(0, existing, True)
    lost = torch.zeros(1, dtype=torch.float32, device=x.device)
    db = score.accumulate_rest(
        update.slots,
        x,
        g,
        update.carry,
        update.seed,
        taken,
        lost,
        signed=update.signed,
        bias_grad=operands.bias_grad,
    )
    dw = residual_gemm.residual_gemm(
        update.slots,
        x,
        g,
        selection.indices,
        update.carry,
        update.seed,
        lost,
        signed=update.signed,
        block_rows=config.block_rows,
    )
    filled.index_fill_(0, existing, False)
    scores = None
    if operands.is_observed:
        # The sums of selected rows are not stored, so their scores are those of the batch's rows.
        scores = torch.where(taken, score.row_scores(x, g)[0], score.row_scores(mx, mg)[0])
    operands.observe(selection, dw, scores)
    return Gradients(dw, db)


def _existing(selection: Selection, rows: int) -> Tensor:
    """The selected row numbers, the last row's for those that a cut block has beyond it."""
    return selection.indices.clamp(max=rows - 1)


def with_subspace(
    operands: Operands, memory: SubspaceMemory, selection: Selection | None
) -> Gradients:
    """Project X, project G, select, correct, multiply: 1 + 3K/2M passes at most.

    With a basis of the gradients' side the two are exchanged, and db takes a pass of its own.
    """
    x, g, config = operands.x, operands.g, operands.config
    a, b = (x, g) if memory.side == "input" else (g, x)
    basis = memory.basis_of(a).contiguous()
    scale = basis_scale(a.shape[1])
    z, rest = subspace.project(a, basis, scale)
    parts, scores, db = subspace.project_gradient(
        b, z, rest, bias_grad=operands.bias_grad and b is g
    )
    if selection is None:
        selection = operands.select(operands.scores_of_whole_rows(scores), cut_short=False)
    indices, weights = rows_and_weights(selection, config, drop=False)
    if operands.factors is not None:
        zb = subspace.transposed_mm(z, b).t()
        projection = Projection(basis * scale, z, zb)
        operands.collect_factors(a, b, selection, projection, exchanged=a is g)
    c = subspace.correction(
        parts, z, b, indices, weights, block_rows=config.block_rows, is_padded=_is_padded(config)
    )
    dw = gather_gemm(
        a,
        b,
        indices,
        weights,
        block_rows=config.block_rows,
        is_padded=_is_padded(config),
        correction=(c, basis * scale),
    )
    projected = None
    if operands.is_observed:
        projected = ProjectedRows(rest, z, parts.sum(0), a.shape[1])
    operands.observe(selection, dw, scores, projected)
    memory.end_step(a, z)
    if a is g:
        return Gradients(dw.t().contiguous(), operands.sum_rows())
    return Gradients(dw, db)


def _precision(x: Tensor, stored: Tensor) -> str | None:
    """For a float32 memory of half-precision rows tf32, which is as exact as the rows are."""
    from_half = x.dtype != torch.float32 and stored.dtype == torch.float32
    return "tf32" if from_half and targets.current(x.device).has_tf32 else None


def _is_padded(config: MemAOPConfig) -> bool:
    """Whether a selection names many rows of weight 0, to have a fixed size."""
    return config.selection == "bernoulli"
