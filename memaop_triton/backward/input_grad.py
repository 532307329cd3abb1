"""The input gradient dX = G W, sampled from K of the M rows of G or projected.

Without a subspace the rows are zeros but for the selected ones, which the weight gradient uses too.
With a basis Q [P, q] of a low-dimensional subspace that holds most of the energy of G's rows, every
row has its part inside exactly, and the selected ones the rest:

    Z = G Q        dX = Z (Qᵀ W) + Σ_{m∈S} w_m e_m (G_m − Z_m Qᵀ) W

e_m being the m-th unit vector. It is unbiased whatever Q is, like the weight gradient.

A projected dX has every row inside a subspace of dX itself, with a basis Q [N, q] of that:

    Z = G (W Q)        dX = Z Qᵀ

The part outside is dropped, but there is no sampling noise, which would reach every layer below.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memaop_triton import dispatch
from memaop_triton.backward.scores import parts_to_score
from memaop_triton.backward.shards import ProcessShards
from memaop_triton.backward.step import Operands, rows_and_weights
from memaop_triton.config import MemAOPConfig
from memaop_triton.dispatch import runs_triton
from memaop_triton.flops import input_grad_flops, projected_input_grad_flops
from memaop_triton.kernels.cpu.torch_ops import basis_scale, sampled_rows_mm
from memaop_triton.memory.kinds import Memory, SubspaceMemory, rows_to_compute
from memaop_triton.memory.stash import Stash
from memaop_triton.sampling.selection import Selection, within


def select_for_both(
    x: Tensor | Stash | None,
    g: Tensor,
    config: MemAOPConfig,
    k: int,
    shards: ProcessShards | None = None,
) -> Selection:
    """Selects the rows of both gradients, with the norms of G's rows as scores.

    With `scores="columns"` the norms are of the columns of G that are read.

    Args:
        x: [M, N], or what is kept of it; `None` if there is no weight gradient. Read with
            `scores="norms"` only, for rows that are not finite.
        g: [M, P].
        config: With an unbiased selection.
        k: How many.
        shards: The processes that hold other columns of X or G.
    """
    scores = dispatch.row_norms(parts_to_score(config.scores, g, g)[1])
    if x is not None and config.scores == "norms":
        # Nothing else of this path reads all of X, where a row that is not finite must show.
        norms = x.rest_norms if isinstance(x, Stash) else dispatch.row_norms(x)
        scores = scores.masked_fill(~norms.isfinite(), torch.inf)
    return _choose(scores, g, config, k, shards)


def sampled_input_grad(
    g: Tensor,
    weight: Tensor,
    selection: Selection,
    config: MemAOPConfig,
    projection: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The selected rows of dX = G W, weighted, zeros elsewhere: [M, N].

    Args:
        g: [M, P].
        weight: W, [P, N].
        selection: Rows and weights.
        config: The configuration that they were selected with.
        projection: E [P, q] and Z [M, q], as `sampled_rows_mm` takes them.
    """
    if runs_triton(g):  # of a fixed size, as they were selected
        return sampled_rows_mm(g, weight, *within(selection, g.shape[0]), projection)
    return sampled_rows_mm(g, weight, *rows_and_weights(selection, config), projection)


def input_grad_with_subspace(
    g: Tensor,
    weight: Tensor,
    config: MemAOPConfig,
    memory: SubspaceMemory,
    shards: ProcessShards | None = None,
    *,
    is_alone: bool = False,
) -> Tensor:
    """dX with the part of G in the memory's subspace exact, and the rest sampled: [M, N].

    Its rows are not those of the weight gradient: each has scores of its own.

    Args:
        g: [M, P].
        weight: W, [P, N].
        config: With an unbiased selection.
        memory: The layer's, with a basis of the gradients' side; updated in place.
        shards: The processes that hold other columns of X or G.
        is_alone: The weight is frozen, and no step of dW precedes.
    """
    basis = memory.basis_for_input_grad(g)
    k = config.num_rows(g.shape[0], weight.shape[1], g.shape[1], memory.cost_of_input_grad)
    if basis.shape[1] == 0:
        selection = _choose(dispatch.row_norms(g), g, config, k, shards)
        return sampled_input_grad(g, weight, selection, config)
    z, rest = dispatch.project_rows(g, basis)
    selection = _choose(rest, g, config, k, shards)
    expand = basis * basis_scale(g.shape[1])
    dx = sampled_input_grad(g, weight, selection, config, (expand, z))
    memory.end_input_grad(g, z, is_alone=is_alone)
    return dx


def projected_input_grad(
    g: Tensor,
    weight: Tensor,
    config: MemAOPConfig,
    memory: SubspaceMemory,
) -> Tensor:
    """dX = G (W Q) Qᵀ with the memory's basis Q of dX's rows, which it brings up to date: [M, N].

    Computes G W itself where that takes no more operations. The rank is what `config` gives for a
    batch of this size.

    Args:
        g: [M, P].
        weight: W, [P, N].
        config: With `grad_input="projected"`.
        memory: Of the layer.
    """
    sizes = g.shape[0], weight.shape[1], g.shape[1]
    rank = config.projection_rank(*sizes)
    if _projected_flops(config, *sizes) >= 2 * math.prod(sizes):
        return g @ weight
    return memory.projection.input_grad(g, weight, rank)


def _projected_flops(config: MemAOPConfig, m: int, n: int, p: int) -> int:
    rank = config.projection_rank(m, n, p)
    return projected_input_grad_flops(m, n, p, rank, config.period)


def flops_of_input_grad(config: MemAOPConfig, memory: Memory | None, m: int, n: int, p: int) -> int:
    """Operations of a layer's dX: dense ones if all rows are taken or a projection saves none."""
    k = rows_to_compute(config, memory, m, n, p)
    if not isinstance(memory, SubspaceMemory) or k == m:
        return input_grad_flops(m, n, p, k)
    if config.projected is not None:
        return min(2 * m * n * p, _projected_flops(config, m, n, p))
    subspace = memory.cost_of_input_grad
    return input_grad_flops(m, n, p, config.num_rows(m, n, p, subspace), subspace)


def _choose(
    scores: Tensor,
    g: Tensor,
    config: MemAOPConfig,
    k: int,
    shards: ProcessShards | None,
) -> Selection:
    operands = Operands(g, g, config, k, shards=shards)
    whole = operands.scores_of_whole_rows(scores)
    return operands.select(whole, cut_short=not runs_triton(g))
