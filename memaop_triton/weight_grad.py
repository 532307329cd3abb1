"""The backward pass of a linear layer: score, select, compute the selected outer products.

`weight_grad` is the whole pipeline for dW. It holds the order of the steps and nothing of how they
are computed; that is in `memaop_triton.kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memaop_triton.config import MemAOPConfig
from memaop_triton.kernels import cpu as kernels
from memaop_triton.memory import Memory, ResidualMemory, SubspaceMemory, check_memory
from memaop_triton.selection import Selection, is_weighted, select_rows


def weight_grad(
    x: Tensor,
    g: Tensor,
    config: MemAOPConfig,
    memory: Memory | None = None,
    *,
    selection: Selection | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Approximate dW = Gᵀ X from K of its M outer products, and update the memory.

    Args:
        x: Inputs, [M, N], floating point. Rows with NaN or Inf reach the result.
        g: Gradient of the loss with respect to the output, [M, P], dtype and device of `x`.
        config: What to compute.
        memory: What `new_memory(config, N, P)` made; updated in place.
        selection: Rows and weights to use instead of scoring `x` and `g`; not for row memories.
        generator: Source of all draws; the device's default one if `None`.

    Returns:
        [P, N] in the dtype of `x`. Zeros for an empty batch, Gᵀ X itself when K = M and no row
        memory is involved.

    Raises:
        ValueError: Shapes do not fit, or `memory` is not of the kind that `config` asks for.
        TypeError: `x` is not floating point, or `g` has another dtype.
    """
    _check_operands(x, g)
    check_memory(config, memory, x.shape[1], g.shape[1])
    rows = x.shape[0]
    if x.numel() == 0 or g.numel() == 0:
        return x.new_zeros((g.shape[1], x.shape[1]))
    if isinstance(memory, ResidualMemory) and not memory.is_paused:
        return _with_row_memory(x, g, config, memory, generator)
    if config.num_rows(rows) == rows:
        return g.t() @ x
    if isinstance(memory, SubspaceMemory):
        return _with_subspace(x, g, config, memory, selection, generator)
    if selection is None:
        selection = select(_scores(kernels.row_norms(x), kernels.row_norms(g)), config, generator)
    return kernels.gather_gemm(x, g, *_rows_and_weights(selection, config))


def select(
    scores: Tensor, config: MemAOPConfig, generator: torch.Generator | None = None
) -> Selection:
    """Pick K of the M rows with these scores ([M]), or whole blocks of them, as `config` says."""
    rows = scores.numel()
    k = config.num_rows(rows)
    block = config.block_rows
    if block == 1 or k == rows:
        return select_rows(scores, k, config.selection, rescale=config.rescale, generator=generator)
    blocks = -(-rows // block)
    padded = torch.nn.functional.pad(scores, (0, blocks * block - rows))
    chosen = select_rows(
        padded.view(blocks, block).sum(1),
        -(-k // block),
        config.selection,
        rescale=config.rescale,
        generator=generator,
    )
    indices = (
        chosen.indices.unsqueeze(1) * block + torch.arange(block, device=scores.device)
    ).flatten()
    weights = chosen.weights.repeat_interleave(block)
    inside = indices < rows
    return Selection(indices[inside], weights[inside])


def select_for_both(
    x: Tensor | None,
    g: Tensor,
    config: MemAOPConfig,
    generator: torch.Generator | None = None,
) -> Selection:
    """Rows for the input gradient and the weight gradient alike, by the norms of G's rows alone.

    Args:
        x: [M, N], or `None` if there is no weight gradient.
        g: [M, P].
        config: With an unbiased selection.
        generator: Source of the draws.
    """
    scores = kernels.row_norms(g)
    if config.memory == "none" and x is not None:
        # Nothing else of this path reads all of X, where a row that is not finite must show.
        scores = scores.masked_fill(~kernels.row_norms(x).isfinite(), torch.inf)
    return select(scores, config, generator)


def sampled_input_grad(
    g: Tensor, weight: Tensor, selection: Selection, config: MemAOPConfig
) -> Tensor:
    """The selected rows of dX = G W, weighted, zeros elsewhere: [M, N]."""
    return kernels.sampled_rows_mm(g, weight, *_rows_and_weights(selection, config))


def _check_operands(x: Tensor, g: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x must be of a floating-point dtype, got {x.dtype}.")
    if g.dtype != x.dtype:
        raise TypeError(f"g is {g.dtype} but x is {x.dtype}: they must agree.")
    if x.dim() != 2 or g.dim() != 2 or x.shape[0] != g.shape[0]:
        raise ValueError(
            f"x must be [M, N] and g [M, P], got {tuple(x.shape)} and {tuple(g.shape)}: flatten "
            "the leading dimensions into rows."
        )


def _scores(x_norms: Tensor, g_norms: Tensor) -> Tensor:
    """‖x_m‖·‖g_m‖, with +Inf for every row that is not finite, 0·Inf among them."""
    return (x_norms * g_norms).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _rows_and_weights(selection: Selection, config: MemAOPConfig) -> tuple[Tensor, Tensor | None]:
    """What the GEMM needs of a selection: no weights that are all 1, no rows of weight 0."""
    indices, weights = selection
    if not is_weighted(config.selection, config.rescale):
        return indices, None
    if config.selection == "bernoulli":
        drawn = weights > 0
        indices, weights = indices[drawn], weights[drawn]
    return indices, weights


def _with_row_memory(
    x: Tensor,
    g: Tensor,
    config: MemAOPConfig,
    memory: ResidualMemory,
    generator: torch.Generator | None,
) -> Tensor:
    rows = x.shape[0]
    mx, mg, filled = memory.slots(rows, x)
    factor = memory.take_carry()
    memory.carry_slots_after(rows, factor)
    carry = filled.to(kernels.score_dtype(mx.dtype)) * factor
    if memory.signed:
        carry *= memory.draw_signs(rows, carry, generator)
    scores = _scores(
        kernels.accumulate_and_score(mx, x, carry), kernels.accumulate_and_score(mg, g, carry)
    )
    selection = select(scores, config, generator)
    dw = kernels.gather_gemm(mx, mg, selection.indices)
    filled.fill_(True)
    memory.empty(selection.indices, scores)
    return dw.to(x.dtype)


def _with_subspace(
    x: Tensor,
    g: Tensor,
    config: MemAOPConfig,
    memory: SubspaceMemory,
    selection: Selection | None,
    generator: torch.Generator | None,
) -> Tensor:
    basis = memory.basis_for(x, generator)
    z, rest_norms = kernels.project_rows(x, basis)
    zg, g_norms = kernels.project_gradient(g, z)
    if selection is None:
        selection = select(_scores(rest_norms, g_norms), config, generator)
    indices, weights = _rows_and_weights(selection, config)
    expand = basis * kernels.basis_scale(x.shape[1])
    dw = kernels.gather_gemm(x, g, indices, weights, kernels.Projection(expand, z, zg))
    memory.end_step(x, z)
    return dw
