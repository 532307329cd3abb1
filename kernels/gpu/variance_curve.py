"""Variance curves of the scores that bases of several ranks leave.

The scores are s_m = ‖what the first r columns of Q leave of a row‖ · ‖the other side's row‖. A
program takes one rank. It holds the scores of all rows, of which there are at most 2,047 (a refresh
reads no more), and sums over them once for every threshold t: Σ min(1, s/t) and Σ s max(0, t − s).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from memaop_triton.kernels.gpu import launch
from memaop_triton.kernels.gpu.primitives import row_offsets

_SMALLEST = tl.constexpr(1.1754943508222875e-38)


@triton.jit(do_not_specialize=["M", "first"])
def variance_curve_kernel(
    z_ptr, rest_ptr, norms_ptr, curves_ptr, M, rank, first, scale, threshold,
    ROWS: tl.constexpr, STEP: tl.constexpr, POINTS: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """curves[i] = shares and variances for the scores beside min(first + i·STEP, rank) columns.

    A column is worth (scale·z)². The first threshold is `threshold` times the mean score, each of
    the others half of the one before. Without NORMS the other side's rows have length 1.
    """
    program = tl.program_id(0)
    row = tl.arange(0, ROWS)
    inside = row < M
    rest = tl.load(rest_ptr + row, mask=inside, other=0)
    left = rest * rest
    z_start = z_ptr + row_offsets(row, rank, False)
    for column in range(tl.minimum(first + program * STEP, rank), rank):
        z = scale * tl.load(z_start + column, mask=inside, other=0).to(tl.float32)
        left += z * z
    score = tl.sqrt(left)
    if NORMS:
        score *= tl.load(norms_ptr + row, mask=inside, other=0)
    count = M.to(tl.float32)
    at = threshold * tl.maximum(tl.sum(score, axis=0) / count, _SMALLEST)
    curves_ptr += program * 2 * POINTS
    for point in range(0, POINTS):
        tl.store(curves_ptr + point, tl.sum(tl.minimum(score / at, 1), axis=0) / count)
        variance = tl.sum(score * tl.maximum(at - score, 0), axis=0)
        tl.store(curves_ptr + POINTS + point, variance)
        at *= 0.5


def variance_curves_(
    curves: Tensor,
    z: Tensor,
    rest: Tensor,
    norms: Tensor | None,
    scale: float,
    *,
    first_rank: int,
    step: int,
    threshold: float,
) -> None:
    """Fill `curves` with what ranks from `first_rank` on, `step` apart, would leave to sample.

    Args:
        curves: [ranks, 2, points] float32, contiguous; the last rank is that of `z`.
        z: A Q / scale, [M, q], contiguous, M below 2¹¹.
        rest: Norms of what Q leaves of each row of A, [M] float32.
        norms: Of the other side's rows, [M] float32; 1 each if `None`.
        scale: As in `subspace.project`.
        first_rank: The least rank.
        step: From one rank to the next, but for the last.
        threshold: The first one, over the mean score; each of the others is half of the one before.

    Raises:
        ValueError: There are more rows.
    """
    rows = z.shape[0]
    padded = max(32, triton.next_power_of_2(rows))
    if padded > 2048:
        raise ValueError(f"{rows} rows: a program holds the scores of at most 2048.")
    launch.launch(
        variance_curve_kernel,
        (curves.shape[0],),
        z_ptr=z, rest_ptr=rest, norms_ptr=norms, curves_ptr=curves,
        M=rows, rank=z.shape[1], first=first_rank, scale=scale, threshold=threshold,
        ROWS=padded, STEP=step, POINTS=curves.shape[2], NORMS=norms is not None,
        num_warps=4 if padded > 512 else 1, num_stages=1,
    )  # fmt: skip
