"""Multiply a matrix by a number on the device, and touch nothing if the number is 1.

M is [M, N]. The loss scale changes once in hundreds of steps, but whether it did is known on the
device only: every program looks, and almost always returns at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memaop_triton.kernels import launch


@triton.jit
def rescale_kernel(m_ptr, factor_ptr, M, N, m_row, BLOCK: tl.constexpr):
    """m ← factor · m for the rows of this program, one in `num_programs`."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        for row in range(tl.program_id(0), M, tl.num_programs(0)):
            start = m_ptr + tl.cast(row, tl.int64) * m_row
            for first in range(0, N, BLOCK):
                columns = first + tl.arange(0, BLOCK)
                value = tl.load(start + columns, mask=columns < N, other=0).to(tl.float32)
                scaled = (value * factor).to(m_ptr.dtype.element_ty)
                tl.store(start + columns, scaled, mask=columns < N)


def rescale_(m: Tensor, factor: Tensor) -> None:
    """Multiply `m` in place.

    Args:
        m: [M, N], float16, bfloat16 or float32, rows of unit stride.
        factor: float32 [1] on the device of `m`.

    Raises:
        ValueError: The rows of `m` have gaps between their elements.
    """
    if m.stride(1) != 1:
        raise ValueError(f"the rows of m must lie without gaps, got strides {m.stride()}.")
    rows, columns = m.shape
    programs = min(rows, 1024)
    block = min(1024, triton.next_power_of_2(max(1, columns)))
    launch.launch(
        rescale_kernel,
        (programs,),
        *(m, factor.to(torch.float32), rows, columns, m.stride(0)),
        BLOCK=block,
        num_warps=4,
        num_stages=1,
    )
