"""Multiply a matrix by a number on the device, and touch nothing if the number is 1.

M is [M, N]. The loss scale changes once in hundreds of steps, but whether it did is known on the
device only: every program looks, and almost always returns at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from memaop_triton.kernels import targets
from memaop_triton.kernels.gpu import launch
from memaop_triton.kernels.tuning import defaults
from memaop_triton.kernels.tuning.config import RowConfig


@triton.jit(do_not_specialize=["M"])
def rescale_kernel(m_ptr, factor_ptr, M, N, m_row, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """m ← factor · m for the rows of this program."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        starts = m_ptr + rows.to(tl.int64) * m_row
        for first in range(0, N, BLOCK_C):
            columns = first + tl.arange(0, BLOCK_C)
            mask = (rows < M)[:, None] & (columns < N)[None, :]
            places = starts[:, None] + columns[None, :]
            value = tl.load(places, mask=mask, other=0).to(tl.float32)
            tl.store(places, (value * factor).to(m_ptr.dtype.element_ty), mask=mask)


def rescale_(m: Tensor, factor: Tensor, *, config: RowConfig | None = None) -> None:
    """Multiply `m` in place.

    Args:
        m: [M, N], float16, bfloat16 or float32, rows of unit stride.
        factor: float32 [1] on the device of `m`.
        config: Tile; chosen by shape if `None`.

    Raises:
        ValueError: The rows of `m` have gaps between their elements.
    """
    if m.stride(1) != 1:
        raise ValueError(f"the rows of m must lie without gaps, got strides {m.stride()}.")
    rows, columns = m.shape
    config = config or defaults.for_rows(targets.current(m.device), rows, False)
    launch.launch(
        rescale_kernel,
        (triton.cdiv(rows, config.block_m),),
        m_ptr=m, factor_ptr=factor,
        M=rows, N=columns, m_row=m.stride(0),
        BLOCK_M=config.block_m, BLOCK_C=config.block_c,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
