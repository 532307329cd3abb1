"""One step of each memory, on any device, by `kernels.cpu`: score, select, multiply, remember.

`steps_triton` holds the same three functions for the Triton kernels; `weight_grad` calls one or
the other. They take operands that have been checked, with K < M unless a row memory is involved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from memaop_triton.config import MemAOPConfig
from memaop_triton.kernels.cpu import native_step
from memaop_triton.kernels.cpu import torch_ops as kernels
from memaop_triton.memory.kinds import ResidualMemory, SubspaceMemory
from memaop_triton.monitor.observer import LayerObserver, Projected
from memaop_triton.selection import (
    Selection,
    cut,
    is_weighted,
    select,
    within,
)

if TYPE_CHECKING:
    from memaop_triton.nn.tensor_parallel import Shards


class Gradients(NamedTuple):
    """dW, [P, N], and the bias gradient, [P], or `None` if nobody asked for it."""

    weight: Tensor
    bias: Tensor | None


class Factors(NamedTuple):
    """Two matrices whose product Gᵀ X is an approximate weight gradient: [R, N] and [R, P]."""

    x: Tensor
    g: Tensor


class Operands(NamedTuple):
    """What a step works on.

    Attributes:
        x: Inputs, [M, N].
        g: Gradient of the loss with respect to the output, [M, P].
        config: What to compute.
        k: Rows to select.
        bias_grad: Whether the sum of the rows of G is wanted too.
        generator: Source of all draws.
        shards: The processes that hold the other columns of these rows, if there are any.
        factors: Takes the pair of matrices whose product dW is, if somebody asks for them.
        observer: Takes note of the step, if somebody watches the layer.
    """

    x: Tensor
    g: Tensor
    config: MemAOPConfig
    k: int
    bias_grad: bool
    generator: torch.Generator | None
    shards: Shards | None = None
    factors: list[Factors] | None = None
    observer: LayerObserver | None = None

    @property
    def is_observed(self) -> bool:
        """Whether this step will be observed, so that what it would drop is kept."""
        return self.observer is not None and self.observer.is_due

    def sum_rows(self) -> Tensor | None:
        """The bias gradient by a pass of its own, if it is wanted."""
        return self.g.sum(0) if self.bias_grad else None

    def whole(self, scores: Tensor) -> Tensor:
        """Scores of whole rows, from those of the columns that are here."""
        return scores if self.shards is None else self.shards.whole(scores)

    def choose(self, scores: Tensor, *, cut_short: bool = True) -> Selection:
        """K of the rows with these scores, the same ones in all shards."""
        if self.shards is None:
            return select(scores, self.config, self.k, self.generator, cut_short=cut_short)
        # How much a cut leaves depends on the draws, which differ until they are shared.
        selection = select(scores, self.config, self.k, self.generator, cut_short=False)
        selection = self.shards.share(selection)
        return cut(selection, scores.numel()) if cut_short else selection

    def in_one_call(
        self,
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
        policy = self.config.selection
        is_alone = self.shards is None and self.config.block_rows == 1
        if not is_alone or policy not in ("priority", "topk") or self.k == a.shape[0]:
            return None
        return native_step.run(
            a,
            b,
            self.k,
            basis,
            added,
            draw=policy == "priority",
            sums=sums,
            transposed=transposed,
            generator=self.generator,
        )

    def keep_factors(
        self,
        x: Tensor,
        g: Tensor,
        selection: Selection,
        projection: kernels.Projection | None = None,
        *,
        exchanged: bool = False,
    ) -> None:
        """Hand over the selected rows of `x` and `g`, weighted, if somebody asks for them."""
        if self.factors is not None:
            selection = within(selection, x.shape[0])
            both = kernels.selected_rows(x, g, *selection, projection)
            self.factors.append(Factors(*(reversed(both) if exchanged else both)))

    def observe(
        self,
        selection: Selection,
        dw: Tensor,
        scores: Tensor | None,
        projected: Projected | None = None,
    ) -> None:
        """Hand over what a step used and computed, as `LayerObserver.observe` takes it."""
        if self.observer is not None:
            self.observer.observe(self, selection, dw, scores, projected)


def without_memory(operands: Operands, selection: Selection | None) -> Gradients:
    """dW from the selected rows; `selection` takes the place of scores."""
    x, g, config, *_ = operands
    scores = dw = None
    if selection is None:
        step = operands.in_one_call(x, g)
        if step is not None:
            scores, selection, dw = step.scores, Selection(step.indices, step.weights), step.product
        else:
            scores = _scores(kernels.row_norms(x), kernels.row_norms(g))
            selection = operands.choose(operands.whole(scores))
    operands.keep_factors(x, g, selection)
    if dw is None:
        dw = kernels.gather_gemm(x, g, *_rows_and_weights(selection, config))
    operands.observe(selection, dw, scores)
    return Gradients(dw, operands.sum_rows())


def with_row_memory(operands: Operands, memory: ResidualMemory) -> Gradients:
    """dW from the rows selected of m ← c·σ·m + x, which are then empty."""
    x, g, _, _, _, generator, *_ = operands
    rows = x.shape[0]
    mx, mg, filled = memory.slots(rows, x)
    memory.follow_loss_scale()
    factor = memory.take_carry()
    memory.carry_slots_after(rows, factor)
    carry = filled.to(kernels.score_dtype(mx.dtype)) * factor
    if memory.signed:
        carry *= memory.draw_signs(rows, carry, generator)
    step = operands.in_one_call(mx, mg, added=native_step.Added(x, g, carry))
    if step is not None:
        scores, selection, dw = step.scores, Selection(step.indices, step.weights), step.product
        whole_scores = scores
    else:
        scores = _scores(
            kernels.accumulate_and_score(mx, x, carry), kernels.accumulate_and_score(mg, g, carry)
        )
        whole_scores, dw = operands.whole(scores), None
        selection = operands.choose(whole_scores)
    operands.keep_factors(mx, mg, selection)
    if dw is None:
        dw = kernels.gather_gemm(mx, mg, selection.indices)
    filled.fill_(True)
    memory.empty(selection.indices, whole_scores)
    operands.observe(selection, dw, scores)
    return Gradients(dw.to(x.dtype), operands.sum_rows())


def with_subspace(
    operands: Operands, memory: SubspaceMemory, selection: Selection | None
) -> Gradients:
    """dW exact inside the memory's subspace, and from selected rows outside of it."""
    x, g, config, _, bias_grad, *_ = operands
    # A basis of the gradients' side makes the same sum with the two exchanged: dWᵀ.
    a, b = (x, g) if memory.side == "input" else (g, x)
    basis = memory.basis_of(a)
    wants_sums = bias_grad and b is g
    step = None
    if selection is None:
        step = operands.in_one_call(a, b, basis, sums=wants_sums, transposed=a is g)
    if step is not None:
        rest, scores, indices, weights, z, zb, db, dw = step
        selection = Selection(indices, weights)
    else:
        z, rest = kernels.project_rows(a, basis)
        zb, b_norms, db = kernels.project_gradient(b, z, bias_grad=wants_sums)
        scores, dw = _scores(rest.clone() if operands.is_observed else rest, b_norms), None
        if selection is None:
            selection = operands.choose(operands.whole(scores))
    if dw is None or operands.factors is not None:
        projection = kernels.Projection(basis * kernels.basis_scale(a.shape[1]), z, zb)
        operands.keep_factors(a, b, selection, projection, exchanged=a is g)
    if dw is None:
        rows = _rows_and_weights(selection, config)
        dw = kernels.gather_gemm(a, b, *rows, projection, transposed=a is g)
    projected = Projected(rest, z, zb, a.shape[1]) if operands.is_observed else None
    operands.observe(selection, dw, scores, projected)
    memory.end_step(a, z)
    return Gradients(dw, operands.sum_rows() if db is None else db)


def sampled_input_grad(
    g: Tensor,
    weight: Tensor,
    selection: Selection,
    config: MemAOPConfig,
    projection: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Rows of G W at the selection, weighted, as `kernels.cpu.sampled_rows_mm` has it: [M, N]."""
    return kernels.sampled_rows_mm(g, weight, *_rows_and_weights(selection, config), projection)


def _rows_and_weights(selection: Selection, config: MemAOPConfig) -> tuple[Tensor, Tensor | None]:
    """What the GEMM needs of a selection: no weights that are all 1, no rows of weight 0."""
    indices, weights = selection
    if not is_weighted(config.selection, config.rescale):
        return indices, None
    if config.selection == "bernoulli":
        drawn = weights > 0
        indices, weights = indices[drawn], weights[drawn]
    return indices, weights


def _scores(x_norms: Tensor, g_norms: Tensor) -> Tensor:
    """‖x_m‖·‖g_m‖ in place of the first, +Inf for every row that is not finite, 0·Inf too."""
    return x_norms.mul_(g_norms).nan_to_num_(nan=torch.inf, posinf=torch.inf)
