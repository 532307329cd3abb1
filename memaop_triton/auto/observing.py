"""What one step of the optimizer shows of a layer: how noisy each number of rows would be."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from memaop_triton.auto.layer_timing import Use
from memaop_triton.backward.step import Operands, ProjectedRows
from memaop_triton.dispatch import row_norms
from memaop_triton.flops import refresh_stride
from memaop_triton.memory.kinds import Memory, SubspaceMemory
from memaop_triton.monitor.observer import LayerObserver, Look
from memaop_triton.nn.layer_state import LayerState
from memaop_triton.sampling.selection import Selection
from memaop_triton.sampling.variance import variance_at, variance_curve


class Seen(NamedTuple):
    """One step of a layer.

    Attributes:
        uses: What each backward pass of the layer computed.
        curves: Of each pass the `variance_curve` of every subspace that it might use, or the one
            without: variances in the units of the gradients, of all rows.
        computed: ‖Σ dW‖² over the passes, as computed.
        shares: K/M of each pass; 1 where it was exact.
    """

    uses: list[Use]
    curves: list[list[list[list[float]]]]
    computed: float
    shares: list[float]

    def variance_of(self, share: float) -> float:
        """V of the step with this share of the rows, by the best subspace."""
        return self._variance([share] * len(self.uses))

    @property
    def square(self) -> float:
        """D of the step, an estimate: the square of what was computed less its variance."""
        return max(0.0, self.computed - self.included)

    @property
    def included(self) -> float:
        """The variance that `computed` has from passes that sampled their rows."""
        return self._variance(self.shares)

    def _variance(self, shares: list[float]) -> float:
        """V with a share for each pass."""
        return sum(
            min(variance_at(share, *curve) for curve in of_pass)
            for share, of_pass in zip(shares, self.curves, strict=True)
        )

    @property
    def is_finite(self) -> bool:
        """Whether the step is of use."""
        total = self.computed + sum(sum(sum(v) for v in c) for p in self.curves for c in p)
        return total - total == 0


class StepObserver:
    """Takes note of the backward passes of one layer in one step; an `Observer` of its state.

    Nothing is read on the host until `read`. A monitor's observer, whose place this one takes, is
    told everything: it hears of no other exact pass, which computes as `nn.Linear` does.

    Args:
        state: Of the layer.
        image: Linear; what is kept of every dW ([P, N], float32 or float64), all of it if `None`.

    Attributes:
        gradient: The sum of that over the passes; `None` before the first one.
    """

    is_due = True

    def __init__(self, state: LayerState, image: Callable[[Tensor], Tensor] | None = None) -> None:
        self._state = state
        self._image = image
        watching = state.observer
        self._watching = watching if isinstance(watching, LayerObserver) else None
        self._uses: list[Use] = []
        self._shares: list[float] = []
        self._curves: list[Tensor] = []
        self.gradient: Tensor | None = None

    def begin_step(self, device: torch.device) -> None:
        """Every pass is observed."""
        if self._watching is not None:
            self._watching.is_due = True

    def observe(
        self,
        operands: Operands,
        selection: Selection,
        dw: Tensor,
        scores: Tensor | None = None,
        projected: ProjectedRows | None = None,
    ) -> None:
        """Take note of a pass that sampled its rows."""
        self._note(operands, dw, self._state.memory)
        if self._watching is not None:
            self._watching.observe(operands, selection, dw, scores, projected)

    def observe_exact(self, operands: Operands, dw: Tensor, memory: Memory | None) -> None:
        """Take note of a pass that computed all of them."""
        self._note(operands, dw, memory)
        if self._watching is not None:  # after the first pass has made the basis of its memory
            self._watching.observe_exact(operands, dw, memory)

    def _note(self, operands: Operands, dw: Tensor, memory: Memory | None) -> None:
        x, g = operands.inputs, operands.g
        (rows, n), p = x.shape, g.shape[1]
        # dX is exact in any case, and does not count.
        patches = operands.patches
        use = Use(
            rows,
            n,
            p,
            x.dtype,
            x.device,
            needs_bias=operands.bias_grad,
            needs_input=False,
            convolution=None if patches is None else patches.convolution,
        )
        self._uses.append(use)
        self._shares.append(operands.k / rows)
        rank = memory.choice.max_rank if isinstance(memory, SubspaceMemory) else 0
        stride = refresh_stride(rows, rank)
        few = g[::stride]
        if isinstance(memory, SubspaceMemory) and rank:
            curves = _curves_beside(memory, x[::stride], few)
        elif isinstance(x, Tensor):
            curves = variance_curve(row_norms(x[::stride]) * row_norms(few))[None]
        else:
            curves = variance_curve(x.scores(g)[::stride])[None]
        curves[:, 1] *= rows / len(few)
        self._curves.append(curves.double())
        # Passes add up to the gradient that the optimizer sees.
        dw = dw.float() if dw.dtype != torch.float64 else dw
        dw = dw if self._image is None else self._image(dw)
        self.gradient = dw.clone() if self.gradient is None else self.gradient.add_(dw)

    def read(self) -> Seen | None:
        """What was seen; `None` if the layer computed no gradient in the step."""
        if self.gradient is None:
            return None
        curves = torch.stack(self._curves).tolist()
        computed = torch.linalg.vector_norm(self.gradient).double().square().item()
        return Seen(self._uses, curves, computed, self._shares)

    def tell(self, seen: Look) -> None:
        """Hand what the step showed, to all processes together, on to the monitor."""
        if self._watching is not None:
            self._watching.looks.append(seen)


def _curves_beside(memory: SubspaceMemory, x: Tensor, g: Tensor) -> Tensor:
    """Of what the bases of a memory leave, which then follow these rows."""
    bases, rank = memory.bases, memory.choice.max_rank
    rows = {side: x if side == "input" else g for side in bases}
    for side, basis in bases.items():
        basis.of(rows[side], rank)  # the first batch makes it
    choices = len(memory.choice.sides) * len(memory.choice.ranks)
    curves = memory.choice.curves_of(bases, x, g, iterate=False)[:choices]
    for side, basis in bases.items():
        basis.follow(rows[side])
    return curves
