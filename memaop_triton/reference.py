"""The reference for tests: one step computed as the equations are written, in any dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memaop_triton.config import MemAOPConfig
from memaop_triton.sampling.selection import Selection, select_rows


class ReferenceStep(NamedTuple):
    """Everything a step computes.

    Attributes:
        weight_grad: dW, [P, N].
        scores: [M].
        selection: Rows and weights that were used.
        memory: (X, G) slots after the step, zeros where empty; `None` without a row memory.
    """

    weight_grad: Tensor
    scores: Tensor
    selection: Selection
    memory: tuple[Tensor, Tensor] | None


def weight_grad_reference(
    x: Tensor,
    g: Tensor,
    config: MemAOPConfig,
    *,
    memory: tuple[Tensor, Tensor] | None = None,
    carry: float = 1.0,
    basis: Tensor | None = None,
    side: str = "input",
    selection: Selection | None = None,
    generator: torch.Generator | None = None,
) -> ReferenceStep:
    """One step of the weight gradient in plain PyTorch, without changing any argument.

    The equations are those of `ResidualMemory`, `SubspaceMemory` and `select_rows`. Draws come from
    `generator` in the order in which `weight_grad` takes them: signs, then the selection.

    Args:
        x: [M, N], float32 or float64.
        g: [M, P].
        config: As for `weight_grad`; `block_rows` must be 1, `scores` `"norms"`, and there must be
            no budget.
        memory: (X, G) slots before the step, [M, N] and [M, P]; zeros if `None`.
        carry: c, the factor of the stored rows.
        basis: Q, for a subspace memory: [N, q], or [P, q] of the gradients' side.
        side: Whose basis it is, `"input"` or `"grad"`.
        selection: Use these rows instead of selecting.
        generator: Source of the draws.
    """
    slots = None
    if config.row_memory is not None:
        mx, mg = memory or (torch.zeros_like(x), torch.zeros_like(g))
        factor = torch.full((x.shape[0], 1), carry, dtype=x.dtype)
        if config.row_memory.signed:
            coins = torch.empty(x.shape[0], dtype=x.dtype).bernoulli_(0.5, generator=generator)
            factor = factor * (2 * coins - 1).unsqueeze(1)
        x = factor * mx + x
        g = factor * mg + g
    exact = torch.zeros(g.shape[1], x.shape[1], dtype=x.dtype)
    rest_x, rest_g = x, g
    if basis is not None and side == "input":
        exact = g.T @ (x @ basis) @ basis.T
        rest_x = x - x @ basis @ basis.T
    elif basis is not None:
        exact = basis @ (basis.T @ g.T) @ x
        rest_g = g - g @ basis @ basis.T
    scores = rest_x.square().sum(1).sqrt() * rest_g.square().sum(1).sqrt()
    if selection is None:
        selection = select_rows(
            scores,
            config.num_rows(x.shape[0]),
            config.selection,
            generator=generator,
        )
    dw = exact
    for row, weight in zip(*selection, strict=True):
        dw = dw + weight * torch.outer(rest_g[row], rest_x[row])
    if config.row_memory is not None:
        mx, mg = x.clone(), g.clone()
        mx[selection.indices] = 0
        mg[selection.indices] = 0
        slots = (mx, mg)
    return ReferenceStep(dw, scores, selection, slots)
