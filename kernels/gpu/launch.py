"""The one place a Triton kernel is launched from: whatever wants to see launches looks here."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

# Passed explicitly, because Triton 3.9 asks for it.
OPTIONS = {"enable_fp_fusion": True}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    **arguments: Any,
) -> None:
    """Run `kernel` over `grid` on the device of the first tensor among its arguments.

    Args:
        kernel: A `triton.jit` function.
        grid: Number of programs along each axis; nothing happens if one is 0.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
        arguments: The kernel's arguments by name. `None` for a pointer that a flag says is not
            used.
    """
    if 0 in grid:
        return
    device = next(a.device for a in arguments.values() if isinstance(a, Tensor))
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[grid](num_warps=num_warps, num_stages=num_stages, **OPTIONS, **arguments)
