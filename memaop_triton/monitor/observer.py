"""Running averages of one layer's backward passes, on the layer's device.

A `LayerState` has a `LayerObserver` while a `Monitor` watches the model. Steps pass it what they
have computed. It makes no host synchronisation; only reading does.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from memaop_triton.backward.step import Operands, ProjectedRows
from memaop_triton.dispatch import project_rows, row_norms
from memaop_triton.kernels import targets
from memaop_triton.kernels.cpu.torch_ops import basis_scale, score_dtype
from memaop_triton.memory.capture import check_not_capturing
from memaop_triton.memory.kinds import Memory, SubspaceMemory
from memaop_triton.monitor.estimates import (
    Figures,
    batch_variance,
    contributions_of,
    effective_sample_size,
    sampling_variance,
)
from memaop_triton.sampling.selection import Selection
from memaop_triton.sampling.variance import POINTS, variance_curve


class Look(Protocol):
    """What `ratio="auto"` saw of a layer in one step of the optimizer."""

    @property
    def square(self) -> float:
        """D, the squared norm of the exact gradient."""
        ...

    def variance_of(self, share: float) -> float:
        """V of this share of the rows."""
        ...


class LayerObserver:
    """Running averages over every `every`-th backward pass of a layer.

    Averages are exponential: an observation counts `smoothing` times as much as the one after it,
    and a new observer's averages are not biased towards zero. A step with a row that is not finite
    is counted and left out of the averages.

    While a CUDA graph is captured every step is observed, because a replay runs nothing on the host
    that could count. All tensors that are written exist before the capture: the constructor makes
    them, and the first step those of the slots' ages. So a replay continues where the last one
    ended.

    Args:
        every: Backward passes from one observation to the next, on average.
        smoothing: In [0, 1).
        device: Of the layer.

    Attributes:
        is_due: Whether the step that is running is observed.
        rows: M of the last observed step, 0 before it.
        k: Rows that it computed.
        ages: [slots], int32: steps since each slot of a row memory was emptied; `None` without.
        looks: The newest that a decision of `ratio="auto"` is based on.
    """

    def __init__(self, every: int, smoothing: float, device: torch.device) -> None:
        self.every = every
        self.smoothing = smoothing
        self.is_due = False
        self.rows = 0
        self.k = 0
        self.ages: Tensor | None = None
        self.looks: deque[Look] = deque(maxlen=4)
        self._steps = 0
        self._next = 0
        self._observations = 0
        width = len(Figures._fields) + 2 * POINTS + 1  # the last is the sum of the weights
        self._sums = torch.zeros(width, dtype=torch.float64, device=device)
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)

    def begin_step(self, device: torch.device) -> None:
        """Decide whether the step that begins on `device` is observed."""
        self.is_due = self._steps == self._next
        if self.is_due:
            self._observations += 1
            # One pass early and one late in turn, so that of a layer that is used twice in a step
            # both uses are observed.
            self._next += self.every + (0 if self.every == 1 else (-1) ** self._observations)
        self._steps += 1
        if targets.is_capturing(device):
            self.is_due = True

    def observe(
        self,
        operands: Operands,
        selection: Selection,
        dw: Tensor,
        scores: Tensor | None = None,
        projected: ProjectedRows | None = None,
    ) -> None:
        """Observe a step, if it is due; the arguments are those of `backward.step.Observer`.

        Scores that are `None` are computed here.
        """
        if operands.config.row_memory is not None:
            self._age_slots(operands.x.shape[0], selection.indices)
        if self.is_due:
            self._add(operands, selection, dw, scores, projected)

    def observe_exact(self, operands: Operands, dw: Tensor, memory: Memory | None) -> None:
        """Observe a step that computed all rows, with the scores that sampling would use."""
        if not self.is_due:
            return
        scores = projected = None
        if isinstance(memory, SubspaceMemory) and memory.basis is not None and memory.rank:
            g, features = operands.g, operands.inputs.shape[1]
            if memory.side == "input":
                z, rest = operands.project_inputs(memory.basis_of(g))
                scores = rest * row_norms(g)
            else:
                z, rest = project_rows(g, memory.basis_of(g))
                scores, features = rest * operands.norms_of_inputs(), g.shape[1]
            projected = ProjectedRows(rest, z, z[:0], features)
        self._add(operands, None, dw, scores, projected)

    def read(self) -> tuple[Tensor, Tensor]:
        """Weighted sums of figures and of the scores' `variance_curve`, then of 1; and counts.

        Counts are of observations, of those that were left out, and of rows that were not finite.
        """
        return self._sums, self._counts

    def _age_slots(self, rows: int, emptied: Tensor) -> None:
        """One step older, but for the slots that the step emptied."""
        if self.ages is None or self.ages.numel() < rows:
            check_not_capturing(emptied.device, "the ages of a memory's slots")
        if self.ages is None:
            self.ages = torch.zeros(rows, dtype=torch.int32, device=emptied.device)
        elif self.ages.device != emptied.device:
            self.ages = self.ages.to(emptied.device)
        if self.ages.numel() < rows:
            self.ages = torch.cat([self.ages, self.ages.new_zeros(rows - self.ages.numel())])
        self.ages += 1
        # A selected block that the batch cuts short has indices beyond the last row.
        self.ages.index_fill_(0, emptied.clamp(max=rows - 1), 0)

    def _add(
        self,
        operands: Operands,
        selection: Selection | None,
        dw: Tensor,
        scores: Tensor | None,
        projected: ProjectedRows | None,
    ) -> None:
        g, config = operands.g, operands.config
        self.rows, self.k = g.shape[0], operands.k
        if scores is None or config.row_memory is not None:
            own = operands.scores_of_rows().double()
        else:
            own = scores.double()
        s, zero = own if scores is None else scores.double(), own.new_zeros(())
        parts = _Parts(own.dot(own), zero, zero, zero)
        if projected is not None:
            parts = _parts_of(s, projected)
        dw_square = torch.linalg.vector_norm(dw.to(score_dtype(dw.dtype))).double().square()
        contributions, variance, dense_square, remembered = s, zero, dw_square, zero
        if selection is not None:
            contributions = contributions_of(selection, s)
            if config.is_unbiased:
                sampled_square = dw_square - parts.exact
                variance = sampling_variance(config, self.k, selection, s, sampled_square)
                dense_square = dw_square - variance
            else:
                dense_square = zero
        is_computed = contributions > 0
        left = s.masked_fill(is_computed, 0)
        if selection is not None and config.row_memory is not None:
            remembered = left.dot(left)
        score_sum = s.sum()
        figures = Figures(
            score_sum=score_sum,
            computed_score_sum=score_sum - left.sum(),
            effective_sample_size=effective_sample_size(contributions),
            nonzero_rows=s.count_nonzero().double(),
            sampling_variance=variance,
            gradient_square=dense_square,
            batch_variance=batch_variance(parts.own, dense_square, self.rows),
            batch_square_sum=parts.own,
            remembered_square_sum=remembered,
            input_square_sum=parts.inputs,
            outside_square_sum=parts.outside,
        )
        curve = variance_curve(s).flatten()
        new = torch.cat([torch.stack(figures), curve, torch.ones_like(curve[:1])])
        self._mix(new, _count_nonfinite(s))

    def _mix(self, new: Tensor, lost_rows: Tensor) -> None:
        is_finite = _count_nonfinite(new) == 0
        if self._sums.device != new.device:
            check_not_capturing(new.device, "the averages of a monitor")
            self._sums, self._counts = self._sums.to(new.device), self._counts.to(new.device)
        mixed = self._sums.lerp(new, 1 - self.smoothing)
        self._sums.copy_(torch.where(is_finite, mixed, self._sums))
        self._counts += torch.stack([is_finite, ~is_finite, lost_rows])


class _Parts(NamedTuple):
    """Squared norms, float64, [].

    Attributes:
        own: Σ ‖g_m‖² ‖x_m‖² over the rows of the batch.
        inputs: Σ ‖x_m‖², or Σ ‖g_m‖² where the subspace is one of G.
        outside: The part of it outside the subspace.
        exact: Of the part of dW inside the subspace.
    """

    own: Tensor
    inputs: Tensor
    outside: Tensor
    exact: Tensor


def _parts_of(scores: Tensor, projected: ProjectedRows) -> _Parts:
    """From the scores of what the subspace leaves ([M], float64) to whole rows."""
    scale = basis_scale(projected.features)
    rest = projected.rest.double()
    inside = scale * torch.linalg.vector_norm(projected.z.double(), dim=1)
    exact = scale * torch.linalg.vector_norm(projected.zg.double())
    # The scores hold the norms of G: ‖g‖ ‖Qᵀ x‖ = s ‖Qᵀ x‖ / rest, and 0/0 is a row of zeros.
    both = scores * torch.where(rest > 0, inside / rest, 0)
    outside = rest.dot(rest)
    inputs = inside.dot(inside) + outside
    return _Parts(scores.dot(scores) + both.dot(both), inputs, outside, exact.square())


def _count_nonfinite(a: Tensor) -> Tensor:
    """Number of elements that are NaN or infinite: a − a is NaN for these and 0 for others."""
    return (a - a).count_nonzero()
