"""Whether the Triton kernels or plain PyTorch (and C) compute on a tensor.

| `MEMAOP_TRITON_BACKEND` | tensors on a GPU | tensors on a CPU |
|---|---|---|
| unset | Triton, if installed, for float16, bfloat16 and float32 | PyTorch and C |
| `torch` | PyTorch | PyTorch alone |
| `triton` | Triton | Triton's interpreter, with `TRITON_INTERPRET=1`; an error without |
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memaop_triton.config import MemAOPConfig
from memaop_triton.flops import MAX_RANK, RANK_STEP
from memaop_triton.kernels import env, targets
from memaop_triton.kernels.cpu import stash as cpu_stash
from memaop_triton.kernels.cpu import torch_ops
from memaop_triton.kernels.cpu.stash import Inside, RoundedRows
from memaop_triton.kernels.draws import NOT_DRAWN, draw_seed, draw_seed_tensor
from memaop_triton.sampling.selection import Selection, is_weighted, select
from memaop_triton.sampling.variance import FIRST_POWER, variance_curve

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def runs_triton(a: Tensor, *, rank: int = 0, memory_dtype: torch.dtype | None = None) -> bool:
    """Whether the Triton kernels take rows like those of `a`.

    Args:
        a: X or G.
        rank: Columns of the subspace's basis, 0 for none.
        memory_dtype: Storage of the row memory; that of `a` if `None`.

    Raises:
        RuntimeError: `MEMAOP_TRITON_BACKEND=triton`, and the kernels cannot compute this.
    """
    choice = env.backend()
    if choice == "torch" or (choice == "" and not a.is_cuda):
        return False
    obstacle = _obstacle(a, rank, memory_dtype or a.dtype)
    if obstacle and choice == "triton":
        raise RuntimeError(f"MEMAOP_TRITON_BACKEND='triton' cannot be followed: {obstacle}.")
    return not obstacle


def explain(a: Tensor) -> str:
    """What computes on rows like those of `a`, and why: "Triton kernels: ...", "PyTorch: ...".

    Raises:
        ValueError: `MEMAOP_TRITON_BACKEND` is neither "torch" nor "triton".
    """
    choice = env.backend()
    asked = f"MEMAOP_TRITON_BACKEND={choice!r} asks for it"
    if choice == "torch":
        return f"PyTorch: {asked}"
    if choice == "" and not a.is_cuda:
        return "PyTorch: the default on a CPU"
    obstacle = _obstacle(a, 0, a.dtype)
    if not obstacle:
        return f"Triton kernels: {asked if choice else 'the default on a GPU'}"
    if choice == "triton":
        return f"an error: {asked}, but {obstacle}"
    return f"PyTorch: {obstacle}"


def _obstacle(a: Tensor, rank: int, memory_dtype: torch.dtype) -> str:
    if not _is_installed():
        return "Triton is not installed"
    if not a.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors are on {a.device}, which needs TRITON_INTERPRET=1 (slow, for tests)"
    if targets.find(a.device) is None:
        return f"there are no measured limits for {targets.name_of(a.device)} ({a.device})"
    for dtype in (a.dtype, memory_dtype):
        if dtype not in DTYPES:
            return f"there are no kernels for {dtype}"
    return f"rank={rank} is above {MAX_RANK}" if rank > MAX_RANK else ""


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def project_rows(x: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Z = X Q / s ([M, q]) and the norms of what Q leaves of each row ([M])."""
    if not runs_triton(x, rank=basis.shape[1]):
        return torch_ops.project_rows(x, basis)
    from memaop_triton.kernels.gpu import subspace

    if basis.stride(1) != 1:
        basis = basis.contiguous()
    projected = subspace.project(x, basis, torch_ops.basis_scale(x.shape[1]))
    return projected.z, projected.rest


def round_rows(
    x: Tensor,
    bits: int,
    basis: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[RoundedRows, Inside | None]:
    """The rows of `x` in `bits` bits a number, less Z E if there is a basis, and Z and E.

    Args:
        x: [M, N], floating point. A row that is not finite has a norm of NaN.
        bits: 4 or 8.
        basis: Q, [N, q] in the dtype of `x`, orthonormal columns. E = s Qᵀ and Z = X Q / s, with
            s = `basis_scale(N)`, are bfloat16; the Triton kernel computes Z from E.
        generator: Source of the draws; the device's default one if `None`.
    """
    columns = x.shape[1]
    expand, scale = None, torch_ops.basis_scale(columns)
    if basis is not None:
        # Rows that start at multiples of 16 bytes, whatever N is.
        room = x.new_empty((basis.shape[1], -(-columns // 8) * 8), dtype=torch.bfloat16)
        expand = room[:, :columns].copy_(basis.t() * scale)
    if not runs_triton(x, rank=0 if basis is None else basis.shape[1]):
        inside = None
        if basis is not None and expand is not None:
            inside = Inside(project_rows(x, basis)[0].bfloat16(), expand)
        return cpu_stash.round_rows(x, bits, inside, generator), inside
    from memaop_triton.kernels.gpu import stash

    seed = draw_seed_tensor(x.device, generator)
    found = stash.round_rows(x, bits, seed, expand, scale)
    inside = None if found.z is None or expand is None else Inside(found.z, expand)
    return RoundedRows(found.numbers, found.scales, found.norms, seed), inside


def restore_rows(
    stored: RoundedRows,
    bits: int,
    columns: int,
    dtype: torch.dtype,
    indices: Tensor | None = None,
    inside: Inside | None = None,
) -> Tensor:
    """The rows `indices` of what `round_rows` has stored, or all of them: [K, N].

    Args:
        stored: Of rows with this number of columns.
        bits: Of its numbers.
        columns: N.
        dtype: Of the result.
        indices: [K] int64, in [0, M).
        inside: What is added to the rows, as `round_rows` returned it.
    """
    rank = 0 if inside is None else inside.z.shape[1]
    if not runs_triton(stored.norms, rank=rank):
        return cpu_stash.restore_rows(stored, bits, columns, dtype, indices, inside)
    from memaop_triton.kernels.gpu import stash_restore

    picked = None if indices is None else indices.contiguous()
    tensors = stored.numbers, stored.scales, stored.seed
    return stash_restore.restore_rows(tensors, bits, columns, dtype, picked, inside)


def restore_both(
    stored: RoundedRows, bits: int, columns: int, g: Tensor, indices: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of X as `restore_rows`, the same rows of G, and weights that are left to multiply by.

    On a GPU one launch makes both, and has multiplied the rows of G by the weights; but in float16,
    whose range they might leave.

    Args:
        stored: Of X, with this number of columns.
        bits: Of its numbers.
        columns: N.
        g: [M, P].
        indices: [K] int64, in [0, M).
        weights: [K] or `None`.
    """
    if not runs_triton(g):
        x = cpu_stash.restore_rows(stored, bits, columns, g.dtype, indices)
        return x, g.index_select(0, indices), weights
    from memaop_triton.kernels.gpu import stash_restore

    now, later = (None, weights) if g.dtype == torch.float16 else (weights, None)
    tensors = stored.numbers, stored.scales, stored.seed
    both = stash_restore.restore_both(tensors, bits, columns, g, indices.contiguous(), now)
    return both.x, both.g, later


def power_iteration_(
    q: Tensor,
    a: Tensor,
    z: Tensor,
    is_due: Tensor | bool = True,
    *,
    also: Tensor | None = None,
) -> None:
    """Q ← `orthonormalise_` of Aᵀ Z, for a [M, N] and z [M, r] ∝ A Q; the others as there."""
    if not runs_triton(a, rank=z.shape[1]):
        product = torch_ops.transposed_mm(z, a).t()
        orthonormalise_(q, product.to(q.dtype), is_due, also=also)
        return
    from memaop_triton.kernels.gpu import orthonormal, repeated, subspace

    def iterate() -> tuple[()]:
        orthonormal.orthonormalise_(q, subspace.transposed_mm(z, a), is_due, also=also)
        return ()

    if isinstance(is_due, Tensor):
        iterate()
    elif is_due:
        tensors = (a, z, q) if also is None else (a, z, q, also)
        repeated.repeated(("power iteration",), iterate, tensors)


def variance_curves_(
    curves: Tensor, z: Tensor, rest: Tensor, norms: Tensor | None, features: int, ranks: list[int]
) -> None:
    """The `variance_curve` of what is left to sample beside the first r columns of a basis.

    The scores are the norms of what they leave of each row of A, times `norms`.

    Args:
        curves: [ranks, 2, POINTS] in `score_dtype` of A, filled.
        z: A Q / s, [M, q], with s = `basis_scale(features)`.
        rest: Norms of what Q leaves, [M].
        norms: Of the other side's rows, [M]; 1 each if `None`.
        features: Length of the rows of A.
        ranks: r, `RANK_STEP` apart but for the last, which is q.
    """
    scale = torch_ops.basis_scale(features)
    if not runs_triton(z, rank=z.shape[1]):
        scores = torch_ops.norms_left(z, rest, scale, ranks)
        curves.copy_(variance_curve(scores if norms is None else scores * norms))
        return
    from memaop_triton.kernels.gpu import variance_curve as kernel

    kernel.variance_curves_(
        curves,
        z,
        rest,
        norms,
        scale,
        first_rank=ranks[0],
        step=RANK_STEP,
        threshold=2.0**FIRST_POWER,
    )


def repeated(
    what: tuple[Any, ...],
    function: Callable[[], tuple[Tensor, ...]],
    tensors: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """`function()`. Where it only launches Triton kernels, they are launched again as recorded.

    Args:
        what: Says what it does: two of one `what` do the same with the same tensors.
        function: Takes its tensors from its closure.
        tensors: All that it takes.
    """
    if not runs_triton(tensors[0]):
        return function()
    from memaop_triton.kernels.gpu import repeated as recordings

    made: tuple[Tensor, ...] = recordings.repeated(what, function, tensors)
    return made


def orthonormalise_(
    q: Tensor, product: Tensor, is_due: Tensor | bool = True, *, also: Tensor | None = None
) -> Tensor:
    """Q ← an orthonormal basis of the first columns of `product`, of the first two, and so on.

    In place and without a host synchronisation. The Triton kernels, for up to 64 columns, call no
    solver; PyTorch does.

    Args:
        q: [N, r], float32 or float64.
        product: [N, r], same dtype. Zero or not finite: Q is kept.
        is_due: Whether to take it over; a tensor, of one element, is not read by the host.
        also: [N, r], any floating dtype, rows of unit stride: a copy of Q, which follows it.

    Returns:
        Whether Q was taken over: bool, on the device, without dimensions.
    """
    if product.shape[1] <= MAX_RANK and runs_triton(product):
        from memaop_triton.kernels.gpu import orthonormal

        return orthonormal.orthonormalise_(q, product, is_due, also=also)
    # For zeros, qr would return coordinate axes.
    taken = (product.isfinite().all() & (product != 0).any() & is_due).reshape(())
    refreshed = torch.linalg.qr(torch.where(taken, product, q)).Q
    q.copy_(torch.where(taken, refreshed, q))
    if also is not None:
        also.copy_(q)
    return taken


def row_norms(a: Tensor) -> Tensor:
    """Norms of the rows of `a` ([M, N]); NaN and +Inf say that a row is not finite."""
    if not runs_triton(a):
        return torch_ops.row_norms(a)
    from memaop_triton.kernels.gpu import score

    return score.row_norms(a)


class SelectionOnDevice(NamedTuple):
    """What a Triton kernel has selected.

    Attributes:
        selection: Rows and weights.
        factors: The weights in the dtype of the rows, and the number that a product is multiplied
            by then; `None` unless a dtype was given and the kernel has weighted the rows.
    """

    selection: Selection
    factors: tuple[Tensor, Tensor | None] | None


def select_on_device(
    scores: Tensor | None,
    config: MemAOPConfig,
    k: int,
    generator: torch.Generator | None,
    *,
    seed: int | Tensor | None = None,
    dtype: torch.dtype | None = None,
    filled: Tensor | None = None,
    taken: Tensor | None = None,
) -> SelectionOnDevice:
    """As `selection.select`, by a Triton kernel for the policies that have one.

    Args:
        scores: [M]; `None` for rows that are all alike, as many as `taken` has.
        config: The layer's.
        k: Rows to select.
        generator: Source of the draws.
        seed: What the kernel draws from, if it is not to be drawn here.
        dtype: Of the rows that are multiplied by the factors.
        filled: [M] bool, set to false for the rows selected.
        taken: [M] bool, set to whether a row was selected.
    """
    from memaop_triton.kernels.gpu import select as kernel

    like = taken if scores is None else scores
    assert like is not None
    policy, block = config.selection, config.block_rows
    units = -(-k // block)
    if policy in kernel.POLICIES and units * block < like.numel():
        if seed is None:
            seed = seed_of_selection(config, like.device, generator)
        chosen = kernel.select(
            scores,
            units,
            policy,
            seed,
            block_rows=block,
            dtype=dtype if is_weighted(policy) else None,
            filled=filled,
            taken=taken,
        )
        return SelectionOnDevice(Selection(chosen.indices, chosen.weights), chosen.factors)
    if scores is None:
        scores = torch.ones(like.shape, dtype=torch.float32, device=like.device)
    selection = select(scores, config, k, generator)
    mark(selection, filled, taken)
    return SelectionOnDevice(selection, None)


def seed_of_selection(
    config: MemAOPConfig, device: torch.device, generator: torch.Generator | None
) -> int | Tensor:
    """What a selection by the kernel draws from; nothing is drawn for one that is not random."""
    return NOT_DRAWN if config.selection == "topk" else draw_seed(device, generator)


def mark(selection: Selection, filled: Tensor | None, taken: Tensor | None) -> None:
    """Set the flags of selected rows as `select_on_device` does."""
    for flags, value in ((filled, False), (taken, True)):
        if flags is not None:
            if value:
                flags.zero_()
            # A cut block names rows beyond the last one, which is in the same block.
            flags.index_fill_(0, selection.indices.clamp(max=flags.numel() - 1), value)


def rescale_(a: Tensor, factor: Tensor) -> None:
    """Multiply `a` ([M, N]) in place by `factor` (float32 [1]), which is almost always 1."""
    if runs_triton(a):
        from memaop_triton.kernels.gpu import rescale

        rescale.rescale_(a, factor)
    elif a.device.type != "cpu" or factor.item() != 1:
        a.mul_(factor)
