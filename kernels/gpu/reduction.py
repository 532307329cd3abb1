"""The sum of the parts that a split leaves, in one order, so that it repeats bit for bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memaop_triton.kernels.gpu import launch


@triton.jit(do_not_specialize=["parts", "minus"])
def sum_parts_kernel(
    parts_ptr, minus_ptr, out_ptr, parts, minus, count,
    BLOCK: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """out = Σ parts − Σ minus, plus what is there with ACCUMULATE; the order is always the same."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    total = tl.zeros((BLOCK,), tl.float32)
    parts_ptr += places
    for _ in range(0, parts):
        total += tl.load(parts_ptr, mask=inside, other=0)
        parts_ptr += count
    minus_ptr += places
    for _ in range(0, minus):
        total -= tl.load(minus_ptr, mask=inside, other=0)
        minus_ptr += count
    if ACCUMULATE:
        total += tl.load(out_ptr + places, mask=inside, other=0).to(tl.float32)
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=inside)


def parts_of(out: Tensor, split: int) -> Tensor:
    """What `split` programs per tile store their sums into: `out` itself, or float32 parts."""
    if split == 1:
        return out
    return torch.empty((split, *out.shape), dtype=torch.float32, device=out.device)


def sum_parts(
    parts: Tensor, out: Tensor, *, minus: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """`out` ← Σ `parts` − Σ `minus` (+ `out`).

    Args:
        parts: [S, ...] float32, contiguous.
        out: Shape of a part, contiguous, any floating dtype.
        minus: [T, ...] float32, contiguous.
        accumulate: Keep what `out` holds.
    """
    block = 1024
    launch.launch(
        sum_parts_kernel,
        (triton.cdiv(out.numel(), block),),
        *(parts, parts if minus is None else minus, out),
        *(parts.shape[0], 0 if minus is None else minus.shape[0], out.numel()),
        BLOCK=block,
        ACCUMULATE=accumulate,
        num_warps=4,
        num_stages=1,
    )
    return out
