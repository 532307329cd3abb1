"""One step of each memory by the Triton kernels: no host synchronisation, fixed shapes.

The functions are those of `steps_torch`. What differs is that no value is read on the host: the
rows of weight 0 that give `bernoulli` a fixed size are not read but are multiplied, as zeros, and
if M is no multiple of the block size, the last block keeps its indices beyond M, which the kernels
skip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memaop_triton import dispatch
from memaop_triton.backward.step import Gradients, Operands, ProjectedRows, rows_and_weights
from memaop_triton.config import MemAOPConfig
from memaop_triton.kernels import targets
from memaop_triton.kernels.cpu.torch_ops import Projection, basis_scale
from memaop_triton.kernels.draws import draw_seed
from memaop_triton.kernels.gpu import score, subspace
from memaop_triton.kernels.gpu.gather_gemm import Correction, gather_gemm
from memaop_triton.kernels.gpu.pack import pack_rows
from memaop_triton.kernels.gpu.repeated import repeated
from memaop_triton.kernels.gpu.row_weights import RowWeights
from memaop_triton.memory.kinds import ResidualMemory, SubspaceMemory
from memaop_triton.sampling.selection import Selection


def without_memory(operands: Operands, selection: Selection | None) -> Gradients:
    """Score, select, multiply: 1 + K/M passes over X and G."""
    x, g = operands.x, operands.g
    seed = None if selection is not None else _seed(operands)
    if selection is not None or not operands.is_alone:
        return _without_memory(operands, selection, seed)
    dw, db = _repeated_gradients(
        "no memory",
        operands,
        lambda: _without_memory(operands, None, seed),
        (x, g),
        (("seed", seed),),
    )
    return Gradients(dw, db)


def _without_memory(
    operands: Operands, selection: Selection | None, seed: int | Tensor | None
) -> Gradients:
    x, g, config = operands.x, operands.g, operands.config
    scores = None
    if selection is None:
        parts = operands.parts_to_score(whole_grad=operands.bias_grad)
        scores, sums = score.row_scores(*parts, bias_grad=operands.bias_grad)
        chosen = _select(operands, scores, seed)
    else:
        sums = None
        chosen = _given(operands, selection)
    operands.collect_factors(x, g, chosen.selection)
    dw = _multiply(
        operands,
        x,
        g,
        chosen.selection.indices,
        chosen.weights,
        block_rows=config.block_rows,
        is_padded=_is_padded(config),
        sums=sums,
    )
    operands.observe(chosen.selection, dw, scores)
    return Gradients(dw, operands.sum_rows() if sums is None else sums.out)


def _seed(operands: Operands) -> int | Tensor:
    return dispatch.seed_of_selection(operands.config, operands.x.device, operands.generator)


class _Chosen(NamedTuple):
    """Rows, and their weights as `gather_gemm` takes them."""

    selection: Selection
    weights: Tensor | RowWeights | None


def _select(
    operands: Operands,
    scores: Tensor | None,
    seed: int | Tensor | None,
    *,
    filled: Tensor | None = None,
    taken: Tensor | None = None,
) -> _Chosen:
    """Select rows by the scores of the columns that are here, and set flags of a row memory.

    The arguments are those of `dispatch.select_on_device`.
    """
    if scores is not None:
        scores = operands.scores_of_whole_rows(scores)
    if scores is not None and operands.shards is not None:
        selection = operands.select(scores, cut_short=False)
        dispatch.mark(selection, filled, taken)
        return _given(operands, selection)
    selection, factors = dispatch.select_on_device(
        scores,
        operands.config,
        operands.k,
        operands.generator,
        seed=seed,
        dtype=operands.x.dtype,
        filled=filled,
        taken=taken,
    )
    if factors is None:
        return _given(operands, selection)
    return _Chosen(selection, RowWeights(*factors))


def _given(operands: Operands, selection: Selection) -> _Chosen:
    _, weights = rows_and_weights(selection, operands.config, drop=False)
    return _Chosen(selection, weights)


def with_row_memory(operands: Operands, memory: ResidualMemory) -> Gradients:
    """The memory's update scores what it stores: 3 + K/M passes over X and G.

    That holds with all slots filled; an empty one is not read. `randk` needs no scores, so its rows
    are packed before the others are stored: as many passes, and a product that reads rows in
    order. Where the factors of dW are collected it takes the first way too, which stores them.
    """
    x, config = operands.x, operands.config
    slots = memory.slots(x.shape[0], x)
    memory.follow_loss_scale()
    factor = memory.take_carry()
    memory.carry_slots_after(x.shape[0], factor)
    carry = factor
    if isinstance(factor, Tensor):
        carry = factor.to(x.device, torch.float32).reshape(1)
    update = _Update(
        slots, carry, draw_seed(x.device, operands.generator), memory.signed, _seed(operands)
    )
    tensors = (x, operands.g, *slots)
    scalars = (("carry", carry), ("seed", update.seed), ("seed", update.seed_of_selection))
    if config.selection == "randk" and operands.factors is None:
        return _with_unscored_rows(operands, update, tensors, scalars)
    if not operands.is_alone:
        return _with_scored_rows(operands, update)
    dw, db = _repeated_gradients(
        "scored rows",
        operands,
        lambda: _with_scored_rows(operands, update),
        tensors,
        scalars,
    )
    return Gradients(dw, db)


class _Update(NamedTuple):
    """What a row memory's update m ← c·σ·m + x takes besides the rows.

    Attributes:
        slots: mX, mG and the flags of the filled slots.
        carry: c, or float32 [1] on the device.
        seed: Of σ and of the rounding, or int64 [1] on the device.
        signed: Whether σ is drawn.
        seed_of_selection: Of the rows that are drawn.
    """

    slots: tuple[Tensor, Tensor, Tensor]
    carry: float | Tensor
    seed: int | Tensor
    signed: bool
    seed_of_selection: int | Tensor


def _with_scored_rows(operands: Operands, update: _Update) -> Gradients:
    """Update every slot, select by the norms of what is stored, multiply what is stored."""
    x, g, config = operands.x, operands.g, operands.config
    mx, mg, filled = update.slots
    scores, sums = score.accumulate_and_score(
        update.slots,
        x,
        g,
        update.carry,
        update.seed,
        signed=update.signed,
        bias_grad=operands.bias_grad,
    )
    selection = _select(operands, scores, update.seed_of_selection, filled=filled).selection
    dw = _multiply(
        operands,
        mx,
        mg,
        selection.indices,
        block_rows=config.block_rows,
        sums=sums,
        input_precision=_precision(x, mx),
    )
    operands.collect_factors(mx, mg, selection)
    operands.observe(selection, dw, scores)
    return Gradients(dw, None if sums is None else sums.out)


def _with_unscored_rows(
    operands: Operands,
    update: _Update,
    tensors: tuple[Tensor, ...],
    scalars: tuple[tuple[str, Any], ...],
) -> Gradients:
    """Select without scores, add the selected rows to their slots, update the others, multiply.

    The last two arguments are what a repetition takes in the place of the others.
    """
    x, g = operands.x, operands.g
    if operands.is_alone:
        packed_x, packed_g, db = _repeated(
            "unscored rows", operands, lambda: _packed(operands, update)[:3], tensors, scalars
        )
        return Gradients(operands.product(packed_x, packed_g), db)
    packed_x, packed_g, db, chosen = _packed(operands, update)
    dw = operands.product(packed_x, packed_g)
    scores = None
    if operands.is_observed:
        # The sums of selected rows are not stored, so their scores are those of the batch's rows.
        mx, mg, _ = update.slots
        scores = torch.where(chosen.taken, score.row_scores(x, g)[0], score.row_scores(mx, mg)[0])
    operands.observe(chosen.selection, dw, scores)
    return Gradients(dw, db)


class _Taken(NamedTuple):
    """Rows selected, and for every row whether it is."""

    selection: Selection
    taken: Tensor


def _packed(operands: Operands, update: _Update) -> tuple[Tensor, Tensor, Tensor | None, _Taken]:
    """The selected rows of X and G added to their slots, which are emptied; db; the selection."""
    x, g = operands.x, operands.g
    taken = torch.empty(x.shape[0], dtype=torch.bool, device=x.device)
    selection = _select(operands, None, update.seed_of_selection, taken=taken).selection
    packed = pack_rows(
        update.slots, x, g, selection.indices, update.carry, update.seed, signed=update.signed
    )
    sums = score.accumulate_rest(
        update.slots,
        x,
        g,
        update.carry,
        update.seed,
        taken,
        packed.g[0],
        signed=update.signed,
        bias_grad=operands.bias_grad,
    )
    db = None if sums is None else sums.total()
    return packed.x, packed.g, db, _Taken(selection, taken)


def with_subspace(
    operands: Operands, memory: SubspaceMemory, selection: Selection | None
) -> Gradients:
    """Project X, project G, select, correct, multiply: 1 + 3K/2M passes at most.

    With a basis of the gradients' side the two are exchanged.
    """
    x, g = operands.x, operands.g
    a = x if memory.side == "input" else g
    basis = memory.basis_by_row(a)
    seed = None if selection is not None else _seed(operands)
    if selection is not None or not operands.is_alone:
        dw, db, z = _with_basis(operands, basis, selection, seed, exchanged=a is g)
    else:
        dw, db, z = _repeated_gradients(
            "basis of G" if a is g else "basis of X",
            operands,
            lambda: _with_basis(operands, basis, None, seed, exchanged=a is g),
            (x, g, basis),
            (("seed", seed),),
        )
    memory.end_step(a, z)
    return Gradients(dw, db)


def _with_basis(
    operands: Operands,
    basis: Tensor,
    selection: Selection | None,
    seed: int | Tensor | None,
    *,
    exchanged: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """dW, db and Z; with `exchanged` the basis is of the gradients' side."""
    x, g, config = operands.x, operands.g, operands.config
    a, b = (g, x) if exchanged else (x, g)
    scale = basis_scale(a.shape[1])
    wants_sums = operands.bias_grad
    z, rest, a_sums = subspace.project(a, basis, scale, column_sums=wants_sums and exchanged)
    parts, scores, b_sums = subspace.project_gradient(
        b, z, rest, bias_grad=wants_sums and not exchanged
    )
    sums = a_sums or b_sums
    chosen = _given(operands, selection) if selection else _select(operands, scores, seed)
    selection, weights = chosen
    if operands.factors is not None:
        zb = subspace.transposed_mm(z, b).t()
        projection = Projection(basis * scale, z, zb)
        operands.collect_factors(a, b, selection, projection, exchanged=exchanged)
    rows: dict[str, Any] = {"block_rows": config.block_rows, "is_padded": _is_padded(config)}
    c = subspace.correction(parts, z, b, selection.indices, weights, **rows)
    correction = Correction(c, basis, scale, is_of_g=exchanged != operands.is_transposed)
    more: dict[str, Any] = {"correction": correction, "sums": sums, **rows}
    dw = _multiply(operands, x, g, selection.indices, weights, **more)
    projected = None
    if operands.is_observed:
        projected = ProjectedRows(rest, z, parts.sum(0), a.shape[1])
    operands.observe(selection, dw, scores, projected)
    return dw, None if sums is None else sums.out, z


def _multiply(
    operands: Operands,
    x: Tensor,
    g: Tensor,
    indices: Tensor,
    weights: Tensor | RowWeights | None = None,
    **more: Any,
) -> Tensor:
    """dW in the dtype of the inputs by `gather_gemm`, laid out in memory as it is to be."""
    a, b = (g, x) if operands.is_transposed else (x, g)
    out = a.new_empty((b.shape[1], a.shape[1]), dtype=operands.x.dtype)
    return operands.oriented(gather_gemm(a, b, indices, weights, out=out, **more))


def _repeated_gradients(
    name: str,
    operands: Operands,
    function: Callable[[], tuple[Tensor | None, ...]],
    tensors: tuple[Tensor, ...],
    scalars: tuple[tuple[str, Any], ...],
) -> Any:
    """`_repeated` of a function that returns dW first, which is recorded as it lies in memory."""

    def stored() -> tuple[Tensor | None, ...]:
        dw, *others = function()
        assert dw is not None
        return operands.oriented(dw), *others

    dw, *others = _repeated(name, operands, stored, tensors, scalars)
    return operands.oriented(dw), *others


def _repeated(
    name: str,
    operands: Operands,
    function: Callable[[], tuple[Tensor | None, ...]],
    tensors: tuple[Tensor, ...],
    scalars: tuple[tuple[str, Any], ...],
) -> Any:
    """What a part of a step by this name returns; the arguments are those of `repeated`."""
    config = operands.config
    what = (name, id(config), operands.k, operands.bias_grad, operands.is_transposed)
    return repeated(what, function, tensors, scalars, config)


def _precision(x: Tensor, stored: Tensor) -> str | None:
    """For a float32 memory of half-precision rows tf32, which is as exact as the rows are."""
    from_half = x.dtype != torch.float32 and stored.dtype == torch.float32
    return "tf32" if from_half and targets.current(x.device).has_tf32 else None


def _is_padded(config: MemAOPConfig) -> bool:
    """Whether a selection names many rows of weight 0, to have a fixed size."""
    return config.selection == "bernoulli"
