"""Row scores, gather GEMM, memory update and projection for CPU tensors, in plain PyTorch.

Shapes: X is [M, N], G is [M, P]. What bounds these on a CPU is memory traffic outside the GEMM, so
a pass over rows works in chunks that stay in a core's cache between the operations on them, and
nothing of size M·N is allocated.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Two operands of one chunk, split over the cores, stay within a typical second-level cache.
_CHUNK_BYTES = 1 << 20
_PANEL_ROWS = 256


class Projection(NamedTuple):
    """The part of the rows inside a subspace.

    Attributes:
        basis: Q, [N, q], in the dtype of X.
        z: Z = X Q, [M, q].
        zg: Zᵀ G, [q, P].
    """

    basis: Tensor
    z: Tensor
    zg: Tensor


def _chunk_rows(a: Tensor) -> int:
    return max(1, _CHUNK_BYTES // max(1, a.shape[1] * a.element_size()))


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of norms and scores: float64 for float64 rows, float32 for all others."""
    return torch.promote_types(dtype, torch.float32)


def row_norms(a: Tensor) -> Tensor:
    """Euclidean norm of every row of `a` ([M, N]), in `score_dtype`: [M]."""
    if a.dtype == score_dtype(a.dtype):
        return torch.linalg.vector_norm(a, dim=1)
    # Converting inside the reduction takes ten times as long as a converted chunk in the cache.
    norms = torch.empty(a.shape[0], dtype=score_dtype(a.dtype), device=a.device)
    rows = _chunk_rows(a)
    for chunk, out in zip(a.split(rows), norms.split(rows), strict=True):
        torch.linalg.vector_norm(chunk.to(norms.dtype), dim=1, out=out)
    return norms


def accumulate_and_score(memory: Tensor, rows: Tensor, carry: Tensor) -> Tensor:
    """Update `memory` ← carry·memory + rows in place and return the norms of its rows.

    Args:
        memory: [M, N], any floating dtype. Must be finite, even where `carry` is 0.
        rows: [M, N].
        carry: [M], in `score_dtype` of the memory: 0 for an empty slot.

    Returns:
        [M] norms of what is stored, in `score_dtype`.
    """
    norms = torch.empty_like(carry)
    step = _chunk_rows(memory)
    chunks = zip(
        memory.split(step),
        rows.split(step),
        carry.unsqueeze(1).split(step),
        norms.split(step),
        strict=True,
    )
    if memory.dtype == rows.dtype == carry.dtype:
        for m, x, c, out in chunks:
            torch.addcmul(x, m, c, out=m)
            torch.linalg.vector_norm(m, dim=1, out=out)
    else:
        for m, x, c, out in chunks:
            m.copy_(torch.addcmul(x.to(c.dtype), m.to(c.dtype), c))
            torch.linalg.vector_norm(m.to(c.dtype), dim=1, out=out)
    return norms


def gather_gemm(
    x: Tensor,
    g: Tensor,
    indices: Tensor,
    weights: Tensor | None = None,
    projection: Projection | None = None,
) -> Tensor:
    """dW = Σ_k w_k g[i_k]ᵀ x[i_k], and with a projection also what it leaves out: [P, N].

    With Z = X Q the result is (Gᵀ Z) Qᵀ + Σ_k w_k g[i_k]ᵀ (x[i_k] − z[i_k] Qᵀ): the exact part is q
    more outer products of the same GEMM, those of Zᵀ G and Qᵀ.

    Args:
        x: [M, N].
        g: [M, P], same dtype.
        indices: [K] int64, ascending for locality; may repeat.
        weights: [K] in `score_dtype`, or `None` for all 1.
        projection: Q, Z and Zᵀ G.
    """
    rows = indices.numel()
    rank = 0 if projection is None else projection.basis.shape[1]
    # A panel of rows is multiplied while it is in the cache, and memory for one panel is enough.
    # Half precision would round the sum at every panel, so there all rows make one.
    panel = _PANEL_ROWS if x.dtype == score_dtype(x.dtype) else max(1, rows)
    gx = x.new_empty((min(panel, rows) + rank, x.shape[1]))
    gg = g.new_empty((min(panel, rows) + rank, g.shape[1]))
    dw = x.new_empty((g.shape[1], x.shape[1]))
    for start in range(0, rows, panel):
        chosen = indices[start : start + panel]
        n = chosen.numel()
        torch.index_select(x, 0, chosen, out=gx[:n])
        torch.index_select(g, 0, chosen, out=gg[:n])
        if projection is not None:
            gx[:n].addmm_(projection.z.index_select(0, chosen), projection.basis.t(), alpha=-1)
        if weights is not None:
            _scale_rows(gx[:n], gg[:n], weights[start : start + panel])
        if projection is not None and start + n == rows:
            gx[n : n + rank].copy_(projection.basis.t())
            gg[n : n + rank].copy_(projection.zg)
            n += rank
        dw.addmm_(gg[:n].t(), gx[:n], beta=0 if start == 0 else 1)
    return dw


def _scale_rows(x: Tensor, g: Tensor, weights: Tensor) -> None:
    if g.dtype == torch.float16:
        # A weighted gradient may leave float16's range where the outer product does not.
        root = weights.sqrt().unsqueeze(1)
        g.mul_(root)
        x.mul_(root)
    else:
        g.mul_(weights.unsqueeze(1))


def project(x: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Z = X Q and the norms of what the basis leaves of each row, √(‖x‖² − ‖z‖²).

    Args:
        x: [M, N].
        basis: Q, [N, q] in the dtype of `x`, orthonormal to rounding.

    Returns:
        Z [M, q] in the dtype of `x`, and [M] norms in `score_dtype`. A difference that drowns in
        rounding is set to the size of that rounding, so that a non-zero row can always be drawn.
    """
    z = x.new_empty((x.shape[0], basis.shape[1]))
    norms = torch.empty(x.shape[0], dtype=score_dtype(x.dtype), device=x.device)
    step = 4 * _chunk_rows(x)
    for chunk, z_out, norm_out in zip(x.split(step), z.split(step), norms.split(step), strict=True):
        torch.mm(chunk, basis, out=z_out)
        norm_out.copy_(row_norms(chunk))
    squared = norms.square()
    rest = squared - row_norms(z).square()
    floor = squared * torch.finfo(x.dtype).eps
    return z, torch.maximum(rest, floor).sqrt()


def sampled_rows_mm(
    g: Tensor, weight: Tensor, indices: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Rows `indices` of G W, times their weights, and zeros elsewhere: [M, N].

    Args:
        g: [M, P].
        weight: W, [P, N].
        indices: [K] int64; a row named twice is added twice.
        weights: [K] in `score_dtype`, or `None` for all 1.
    """
    rows = g.index_select(0, indices)
    if weights is not None:
        rows.mul_(weights.unsqueeze(1))
    return g.new_zeros((g.shape[0], weight.shape[1])).index_add_(0, indices, rows @ weight)
