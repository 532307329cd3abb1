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

import torch
from torch import Tensor

from memaop_triton.config import MemAOPConfig
from memaop_triton.flops import MAX_RANK
from memaop_triton.kernels import env, targets
from memaop_triton.kernels.cpu import torch_ops
from memaop_triton.selection import Selection, select

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

    return subspace.project(x, basis.contiguous(), torch_ops.basis_scale(x.shape[1]))


def transposed_mm(z: Tensor, a: Tensor) -> Tensor:
    """Zᵀ A in float32 (float64 for float64), [q, N], for z [M, q] and a [M, N]."""
    if not runs_triton(a, rank=z.shape[1]):
        return torch_ops.transposed_mm(z, a)
    from memaop_triton.kernels.gpu import subspace

    return subspace.transposed_mm(z.contiguous(), a).t()


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


def select_on_device(
    scores: Tensor, config: MemAOPConfig, k: int, generator: torch.Generator | None
) -> Selection:
    """As `selection.select`, by a Triton kernel for the policies that have one."""
    from memaop_triton.kernels.gpu import select as kernel

    units = -(-k // config.block_rows)
    if config.selection not in kernel.POLICIES or units * config.block_rows >= scores.numel():
        return select(scores, config, k, generator)
    # A draw like any other: a run resumed with the generator's state repeats it.
    seed = torch.randint(1 << 62, (1,), device=scores.device, generator=generator)
    return Selection(
        *kernel.select(scores, units, config.selection, seed, block_rows=config.block_rows)
    )


def rescale_(a: Tensor, factor: Tensor) -> None:
    """Multiply `a` ([M, N]) in place by `factor` (float32 [1]), which is almost always 1."""
    if runs_triton(a):
        from memaop_triton.kernels.gpu import rescale

        rescale.rescale_(a, factor)
    elif a.device.type != "cpu" or factor.item() != 1:
        a.mul_(factor)
