"""Row scores, gather GEMM, memory update and projection for CPU tensors, in plain PyTorch.

Where the C code takes the operands, it computes instead (`native`).

Shapes: X is [M, N], G is [M, P]. What bounds these on a CPU is memory traffic outside the GEMM, so
a pass over rows works in chunks that stay in a core's cache between the operations on them, and
nothing of size M·N is allocated.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from memaop_triton.kernels import env
from memaop_triton.kernels.cpu import native
from memaop_triton.kernels.cpu.picked import Picked

# Two operands of one chunk, split over the cores, stay within a typical second-level cache.
_CHUNK_BYTES = 1 << 20
_PANEL_ROWS = 512


class Projection(NamedTuple):
    """The part of the rows inside a subspace, X Q Qᵀ = Z (s Q)ᵀ with Z = X Q / s.

    s is a power of two near √N. It keeps Z and Zᵀ G near the size of X and of dW, which float16 can
    hold; without it both are √N times as large.

    Attributes:
        expand: s Q, [N, q], in the dtype of X.
        z: X Q / s, [M, q].
        zg: Zᵀ G, [q, P], in `score_dtype`.
    """

    expand: Tensor
    z: Tensor
    zg: Tensor


def basis_scale(columns: int) -> float:
    """s for rows of this many columns."""
    return float(2 ** round(math.log2(columns) / 2))


def _chunk_rows(a: Tensor) -> int:
    return max(1, _CHUNK_BYTES // max(1, a.shape[1] * a.element_size()))


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of norms and scores: float64 for float64 rows, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_norms(a: Tensor) -> Tensor:
    """Euclidean norm of every row of `a`, in `score_dtype`: [M].

    Args:
        a: [M, N], or blocks of columns, [M, blocks, N].
    """
    norms = native.row_norms(a)
    a = a.flatten(1)
    if norms is None and a.dtype == score_dtype(a.dtype):
        norms = torch.linalg.vector_norm(a, dim=1)
    if norms is not None:
        return norms
    # Converting inside the reduction takes ten times as long as a converted chunk in the cache.
    norms = a.new_empty(a.shape[0], dtype=score_dtype(a.dtype))
    rows = _chunk_rows(a)
    for chunk, out in zip(a.split(rows), norms.split(rows), strict=True):
        torch.linalg.vector_norm(chunk.to(norms.dtype), dim=1, out=out)
    return norms


def norms_left(z: Tensor, rest: Tensor, scale: float, ranks: list[int]) -> Tensor:
    """Norms of what the first r columns of Q leave of each row of A, for each r: [len(ranks), M].

    Args:
        z: A Q / scale, [M, q].
        rest: Norms of what all of Q leaves, [M].
        scale: s.
        ranks: r, from 0 to q.
    """
    inside = (scale * z.to(rest.dtype)).square().cumsum(1)
    whole = rest.square() + inside[:, -1]
    left = [whole - inside[:, r - 1] if r else whole for r in ranks]
    return torch.stack(left).clamp(min=0).sqrt()


def accumulate_and_score(memory: Tensor, rows: Tensor, carry: Tensor) -> Tensor:
    """Update `memory` ← carry·memory + rows in place and return the norms of its rows.

    Args:
        memory: [M, N], any floating dtype. Must be finite, even where `carry` is 0.
        rows: [M, N].
        carry: [M], in `score_dtype` of the memory: 0 for an empty slot.

    Returns:
        [M] norms of what is stored, in `score_dtype`.
    """
    norms = native.accumulate_and_score(memory, rows, carry)
    if norms is not None:
        return norms
    norms = torch.empty_like(carry)
    step = _chunk_rows(memory)
    operands = (memory, rows, carry.unsqueeze(1), norms)
    for m, x, c, out in zip(*(a.split(step) for a in operands), strict=True):
        if m.dtype == x.dtype == c.dtype:
            torch.addcmul(x, m, c, out=m)
        else:
            m.copy_(torch.addcmul(x.to(c.dtype), m.to(c.dtype), c))
        torch.linalg.vector_norm(m.to(c.dtype), dim=1, out=out)
    return norms


def gather_gemm(
    x: Tensor,
    g: Tensor,
    indices: Tensor,
    weights: Tensor | None = None,
    projection: Projection | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """dW = Σ_k w_k g[i_k]ᵀ x[i_k], and with a projection also what it leaves out: [P, N].

    With E = s Q the result is (Gᵀ Z) Eᵀ + Σ_k w_k g[i_k]ᵀ (x[i_k] − z[i_k] Eᵀ): the exact part is q
    more outer products of the same GEMM, those of Zᵀ G and Eᵀ.

    Args:
        x: [M, N].
        g: [M, P], same dtype.
        indices: [K] int64, ascending for locality; may repeat.
        weights: [K] in `score_dtype`, or `None` for all 1.
        projection: E, Z and Zᵀ G.
        transposed: Return dWᵀ, [N, P]; either is contiguous.
    """
    product = native.gather_gemm(x, g, indices, weights, projection, transposed=transposed)
    if product is not None:
        return product
    rows = indices.numel()
    # A panel of rows is multiplied while it is in the cache, and memory for one panel is enough.
    # Half precision would round the sum at every panel, so there all rows make one.
    panel = _PANEL_ROWS if x.dtype == score_dtype(x.dtype) else max(1, rows)
    room = _room_for(x, g, min(panel, rows), projection)
    dw = x.new_empty((x.shape[1], g.shape[1]) if transposed else (g.shape[1], x.shape[1]))
    for start in range(0, max(1, rows), panel):
        end = min(start + panel, rows)
        part = weights if weights is None else weights[start:end]
        gx, gg = selected_rows(
            x, g, indices[start:end], part, projection, is_last=end == rows, room=room
        )
        left, right = (gx, gg) if transposed else (gg, gx)
        dw.addmm_(left.t(), right, beta=0 if start == 0 else 1)
    return dw


def product(
    x: Picked,
    g: Picked,
    weights: Tensor | None = None,
    projection: Projection | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """`gather_gemm` of rows that are picked already, K of either, like those of the projection's z.

    They are put together on the way, if the C code takes them.
    """
    found = native.product(x, g, weights, projection, transposed=transposed)
    if found is not None:
        return found
    every = torch.arange(x.count, device=x.lines.device)
    return gather_gemm(x.matrix(), g.matrix(), every, weights, projection, transposed=transposed)


def selected_rows(
    x: Tensor,
    g: Tensor,
    indices: Tensor,
    weights: Tensor | None = None,
    projection: Projection | None = None,
    *,
    is_last: bool = True,
    room: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The two factors of `gather_gemm`'s product, [K, N] and [K, P]; K + q rows with a projection.

    The arguments are those of `gather_gemm`, on any device.

    Args:
        is_last: Whether the projection's rows follow.
        room: What is written into; of at least as many rows.
    """
    n = indices.numel()
    gx, gg = _room_for(x, g, n, projection) if room is None else room
    torch.index_select(x, 0, indices, out=gx[:n])
    torch.index_select(g, 0, indices, out=gg[:n])
    if projection is not None:
        gx[:n].addmm_(projection.z.index_select(0, indices), projection.expand.t(), alpha=-1)
    if weights is not None and g.dtype == torch.float16:
        # A weighted gradient may leave float16's range where the outer product does not.
        root = weights.sqrt().unsqueeze(1)
        gg[:n].mul_(root)
        gx[:n].mul_(root)
    elif weights is not None:
        gg[:n].mul_(weights.unsqueeze(1))
    if projection is not None and is_last:
        rank = projection.expand.shape[1]
        gx[n : n + rank].copy_(projection.expand.t())
        gg[n : n + rank].copy_(projection.zg)
        n += rank
    return gx[:n], gg[:n]


def _room_for(
    x: Tensor, g: Tensor, rows: int, projection: Projection | None
) -> tuple[Tensor, Tensor]:
    rank = 0 if projection is None else projection.expand.shape[1]
    return x.new_empty((rows + rank, x.shape[1])), g.new_empty((rows + rank, g.shape[1]))


def project_rows(x: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Z = X Q / s and the norms of what the basis leaves of each row, √(‖x‖² − s²‖z‖²).

    Args:
        x: [M, N].
        basis: Q, [N, q] in the dtype of `x`, orthonormal to rounding.

    Returns:
        Z [M, q] in the dtype of `x`, and [M] norms in `score_dtype`. A difference that drowns in
        rounding is set to the size of that rounding, so that every row with a norm can be drawn.
    """
    scale = basis_scale(x.shape[1])
    shrunk = basis / scale
    both = native.project(x, shrunk, scale)
    if both is not None:
        return both
    z = x.new_empty((x.shape[0], basis.shape[1]))
    norms = x.new_empty(x.shape[0], dtype=score_dtype(x.dtype))
    step = 2 * _chunk_rows(x)
    for chunk, z_out, out in zip(*(a.split(step) for a in (x, z, norms)), strict=True):
        torch.mm(chunk, shrunk, out=z_out)
        out.copy_(row_norms(chunk))
    return z, rest_beside(norms, z, scale, _rounding_of_products(x))


def rest_beside(norms: Tensor, z: Tensor, scale: float, rounding: float) -> Tensor:
    """Norms of what a basis leaves of each row, [M], in `score_dtype`.

    Args:
        norms: Of whole rows, [M].
        z: X Q / scale, [M, q].
        scale: s.
        rounding: Relative, of the product. Where the difference drowns in it, the norm is its size.
    """
    squared = norms.square()
    rest = squared - (scale * row_norms(z)).square()
    return torch.maximum(rest, squared * rounding).sqrt()


def _rounding_of_products(x: Tensor) -> float:
    """Relative rounding of products with `x`: on a GPU that of TF32 where it is allowed."""
    eps = torch.finfo(x.dtype).eps
    is_tf32 = x.is_cuda and x.dtype == torch.float32 and env.allows_tf32()
    return max(eps, 2.0**-10) if is_tf32 else eps


def project_gradient(
    g: Tensor, z: Tensor, *, bias_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Zᵀ G, the row norms of G and, if required, the sum of its rows, in one pass over G.

    Args:
        g: [M, P].
        z: [M, q], same dtype.
        bias_grad: Whether to compute the sum.

    Returns:
        Zᵀ G [q, P] and [M] norms, both in `score_dtype`, and the sum [P] in the dtype of `g`.
    """
    norms = g.new_empty(g.shape[0], dtype=score_dtype(g.dtype))
    db = g.new_empty(g.shape[1]) if bias_grad else None
    zg = native.transposed_mm(z, g, norms, db)
    if zg is not None:
        return zg, norms, db
    return _transposed_mm_in_chunks(z, g, norms), norms, g.sum(0) if bias_grad else None


def transposed_mm(z: Tensor, a: Tensor) -> Tensor:
    """Zᵀ A in `score_dtype`, [q, N], for z [M, q] and a [M, N]."""
    product = native.transposed_mm(z, a)
    return _transposed_mm_in_chunks(z, a) if product is None else product


def _transposed_mm_in_chunks(z: Tensor, a: Tensor, norms: Tensor | None = None) -> Tensor:
    product = a.new_zeros((z.shape[1], a.shape[1]), dtype=score_dtype(a.dtype))
    step = 2 * _chunk_rows(a)
    for number, (chunk, z_chunk) in enumerate(zip(a.split(step), z.split(step), strict=True)):
        if norms is not None:
            norms[number * step : (number + 1) * step] = row_norms(chunk)
        product.addmm_(z_chunk.to(product.dtype).t(), chunk.to(product.dtype))
    return product


def sampled_rows_mm(
    g: Tensor,
    weight: Tensor,
    indices: Tensor,
    weights: Tensor | None = None,
    projection: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Rows `indices` of G W, times their weights, and zeros elsewhere: [M, N].

    With a projection Z Eᵀ of G's rows, every row is that of Z Eᵀ W, and the selected ones add what
    it leaves of them.

    Args:
        g: [M, P].
        weight: W, [P, N].
        indices: [K] int64; a row named twice is added twice.
        weights: [K] in `score_dtype`, or `None` for all 1.
        projection: E [P, q] and Z [M, q].
    """
    rows = g.index_select(0, indices)
    if projection is None:
        dx = g.new_zeros((g.shape[0], weight.shape[1]))
    else:
        expand, z = projection
        dx = z @ (expand.t() @ weight)
        rows.addmm_(z.index_select(0, indices), expand.t(), alpha=-1)
    if weights is None:
        product = rows @ weight
    elif g.dtype == torch.float16:
        # A row of G that grows may leave float16's range where that of G W does not.
        factors = weights.unsqueeze(1)
        product = (rows.mul_(factors.clamp(max=1)) @ weight).mul_(factors.clamp(min=1))
    else:
        product = rows.mul_(weights.unsqueeze(1)) @ weight
    if g.device.type == "cpu":
        return dx.index_add_(0, indices, product)
    # On a GPU `index_add_` adds by atomics, in any order, so that sums of three differ from run to
    # run. `index_put_` sorts the indices first, without a host synchronisation.
    return dx.index_put_((indices,), product, accumulate=True)
