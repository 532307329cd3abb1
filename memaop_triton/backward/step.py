"""What a step of the backward pass works on, and what it hands over: the data that all rooms share.

Rooms above that observe a step pass an object that has the methods of the protocol below.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from memaop_triton import dispatch
from memaop_triton.backward.scores import misses_columns, parts_to_score, with_floor
from memaop_triton.backward.shards import ProcessShards
from memaop_triton.config import MemAOPConfig
from memaop_triton.kernels.cpu.picked import Picked
from memaop_triton.kernels.cpu.torch_ops import Projection, selected_rows
from memaop_triton.memory.kinds import Memory
from memaop_triton.memory.maps import Maps
from memaop_triton.memory.patches import Patches
from memaop_triton.memory.row_source import RowSource
from memaop_triton.sampling.selection import Selection, cut, is_weighted, select, within


class Gradients(NamedTuple):
    """dW, [P, N], and the bias gradient, [P], or `None` if it was not asked for."""

    weight: Tensor
    bias: Tensor | None


class Factors(NamedTuple):
    """Two matrices whose product Gᵀ X is an approximate weight gradient: [R, N] and [R, P]."""

    x: Tensor
    g: Tensor


class ProjectedRows(NamedTuple):
    """The rows of a step with a subspace of X, or of G with the two exchanged.

    Attributes:
        rest: ‖x_m − Q Qᵀ x_m‖, [M].
        z: X Q / s, [M, q], with s = `basis_scale(features)`.
        zg: Gᵀ Z or its transpose.
        features: N.
    """

    rest: Tensor
    z: Tensor
    zg: Tensor
    features: int


def rows_and_weights(
    selection: Selection, config: MemAOPConfig, *, drop: bool = True
) -> tuple[Tensor, Tensor | None]:
    """What a product needs of a selection: no weights that are all 1, no rows of weight 0.

    Rows of weight 0 stay unless `drop`: their number is known on the device only.
    """
    indices, weights = selection
    if not is_weighted(config.selection):
        return indices, None
    if drop and config.selection == "bernoulli":
        drawn = weights > 0
        indices, weights = indices[drawn], weights[drawn]
    return indices, weights


class Observer(Protocol):
    """Takes note of the backward passes of one layer."""

    @property
    def is_due(self) -> bool:
        """Whether the step that is running is observed."""
        ...

    def begin_step(self, device: torch.device) -> None:
        """Decide whether the step that begins on `device` is observed."""
        ...

    def observe(
        self,
        operands: Operands,
        selection: Selection,
        dw: Tensor,
        scores: Tensor | None = None,
        projected: ProjectedRows | None = None,
    ) -> None:
        """Take note of a step that computed the rows of `selection`.

        Args:
            operands: What it worked on. Of a layer that is divided among processes, the part here.
            selection: Rows and weights that it used.
            dw: What came out, [P, N].
            scores: Of all rows before the selection, [M], those of the memory where it holds rows;
                computed by the observer if `None`.
            projected: With a subspace, whose scores are of what it leaves.
        """
        ...

    def observe_exact(self, operands: Operands, dw: Tensor, memory: Memory | None) -> None:
        """Take note of a step that computed all rows, and of what sampling them would meet."""
        ...


class Operands(NamedTuple):
    """What a step works on.

    Attributes:
        inputs: X, [M, N], or what its rows can be made of.
        gradients: G, the gradient of the loss with respect to the output, [M, P], or the maps that
            its rows are made of.
        config: What to compute.
        k: Rows to select.
        bias_grad: Whether the sum of the rows of G is wanted too.
        generator: Source of all draws.
        shards: The processes that hold the other columns of these rows, if there are any.
        factors: Takes the pair of matrices whose product dW is, if they are collected.
        observer: Takes note of the step, if the layer is observed.
        is_transposed: Whether dW is to be a view of dWᵀ, [N, P] and contiguous, which the factors
            are those of then.
        patches: Of a convolution, what X is made of.
    """

    inputs: Tensor | RowSource
    gradients: Tensor | Maps
    config: MemAOPConfig
    k: int
    bias_grad: bool = False
    generator: torch.Generator | None = None
    shards: ProcessShards | None = None
    factors: list[Factors] | None = None
    observer: Observer | None = None
    is_transposed: bool = False
    patches: Patches | None = None

    @property
    def x(self) -> Tensor:
        """The inputs, where they are a matrix."""
        assert isinstance(self.inputs, Tensor)
        return self.inputs

    @property
    def g(self) -> Tensor:
        """G as a matrix, which is made of maps when it is first asked for."""
        return self.gradients if isinstance(self.gradients, Tensor) else self.gradients.matrix()

    @property
    def like_g(self) -> Tensor:
        """Some tensor that has the dtype and the device of G."""
        return self.gradients if isinstance(self.gradients, Tensor) else self.gradients.gradients

    @property
    def is_observed(self) -> bool:
        """Whether this step will be observed, so that what it would drop is kept."""
        return self.observer is not None and self.observer.is_due

    @property
    def is_alone(self) -> bool:
        """Whether nobody else takes part in this step: no processes, collector or observer."""
        return self.shards is None and self.factors is None and not self.is_observed

    def product(self, x: Tensor, g: Tensor) -> Tensor:
        """dW from all rows of `x` and `g`, laid out in memory as it is to be."""
        return self.oriented(x.t() @ g if self.is_transposed else g.t() @ x)

    def oriented(self, product: Tensor) -> Tensor:
        """dW of what lies in memory, or the reverse: transposed if `is_transposed`."""
        return product.t() if self.is_transposed else product

    def sum_rows(self) -> Tensor | None:
        """The bias gradient by a pass of its own, if it is wanted."""
        if not self.bias_grad:
            return None
        g = self.gradients
        return g.sum(0) if isinstance(g, Tensor) else g.sum_rows()

    def parts_to_score(self, *, whole_grad: bool = False) -> tuple[Tensor | None, Tensor]:
        """What the configuration's scores read of X and G, as `scores.parts_to_score` says."""
        kind = self.config.scores
        return parts_to_score(kind, self.x, self.g, self.generator, whole_grad=whole_grad)

    def norms_of_inputs(self) -> Tensor:
        """Of the rows of X, [M]."""
        x = self.inputs
        return dispatch.row_norms(x) if isinstance(x, Tensor) else x.norms()

    def scores_of_rows(self) -> Tensor:
        """‖g_m‖·‖x_m‖ of whole rows, [M], without a memory."""
        x, g = self.inputs, self.g
        if isinstance(x, Tensor):
            return dispatch.row_norms(x) * dispatch.row_norms(g)
        return x.scores(g)

    def project_inputs(self, basis: Tensor) -> tuple[Tensor, Tensor]:
        """`dispatch.project_rows` of X."""
        x = self.inputs
        return dispatch.project_rows(x, basis) if isinstance(x, Tensor) else x.project(basis)

    def project_gradients(self, basis: Tensor) -> tuple[Tensor, Tensor]:
        """`dispatch.project_rows` of G."""
        g = self.gradients
        return dispatch.project_rows(g, basis) if isinstance(g, Tensor) else g.project(basis)

    def pick_gradients(self, indices: Tensor) -> Picked:
        """Rows of G by their numbers ([K] int64)."""
        g = self.gradients
        return Picked(g, indices) if isinstance(g, Tensor) else g.picked(indices)

    def scores_of_whole_rows(self, scores: Tensor) -> Tensor:
        """Scores of whole rows, from those of the columns that were read here: [M]."""
        whole = scores if self.shards is None else self.shards.all_reduce_scores(scores)
        is_partial = misses_columns(
            self.config.scores, self.inputs.shape[1], self.gradients.shape[1]
        )
        return with_floor(whole) if is_partial else whole

    def select(self, scores: Tensor, *, cut_short: bool = True) -> Selection:
        """K of the rows with these scores (of whole rows, [M]), the same ones in all shards.

        With `cut_short` the rows that the last block lacks are left out, which takes the host a
        look at the draws. Without it they are named, from M on, and a kernel selects if there is
        one.
        """
        if cut_short:
            selection = select(scores, self.config, self.k, self.generator)
        else:
            selection = dispatch.select_on_device(
                scores, self.config, self.k, self.generator
            ).selection
        # How much a cut leaves depends on the draws, which differ until they are shared.
        if self.shards is not None:
            selection = self.shards.broadcast_selection(selection)
        rows = scores.numel()
        is_cut = cut_short and rows % self.config.block_rows
        return cut(selection, rows) if is_cut else selection

    def collect_factors(
        self,
        x: Tensor,
        g: Tensor,
        selection: Selection,
        projection: Projection | None = None,
        *,
        exchanged: bool = False,
    ) -> None:
        """Hand over the selected rows of `x` and `g`, weighted, if factors are collected."""
        if self.factors is not None:
            indices, weights = within(selection, x.shape[0])
            both = selected_rows(x, g, indices, weights, projection)
            swaps = exchanged != self.is_transposed
            self.factors.append(Factors(*(reversed(both) if swaps else both)))

    def observe(
        self,
        selection: Selection,
        dw: Tensor,
        scores: Tensor | None,
        projected: ProjectedRows | None = None,
    ) -> None:
        """Hand over what a step used and computed, as `Observer.observe` takes it.

        An observer is not told cheap scores: it computes the norms of the rows itself.
        """
        if self.observer is not None:
            true_scores = scores if self.config.scores == "norms" else None
            self.observer.observe(self, selection, dw, true_scores, projected)
