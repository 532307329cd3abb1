"""Variance curves by the Triton kernel against PyTorch's in float64; shared by several tiers."""

import torch

from memaop_triton.flops import RANK_STEP
from memaop_triton.kernels.cpu.torch_ops import norms_left
from memaop_triton.kernels.gpu.variance_curve import variance_curves_
from memaop_triton.sampling.variance import FIRST_POWER, POINTS, variance_curve

SCALE = 4.0


def check_curves(rows, rank, dtype, *, first_rank=0, weighted=True, device="cpu"):
    """For ranks from `first_rank` to `rank`; one row is as large as all others together."""
    z = torch.randn(rows, rank, device=device).to(dtype)
    rest, norms = (torch.rand(rows, device=device) for _ in range(2))
    rest[rows // 2] *= rows
    ranks = [*range(first_rank, rank, RANK_STEP), rank]
    curves = torch.full((len(ranks), 2, POINTS), torch.nan, device=device)
    variance_curves_(
        curves,
        z,
        rest,
        norms if weighted else None,
        SCALE,
        first_rank=first_rank,
        step=RANK_STEP,
        threshold=2.0**FIRST_POWER,
    )
    scores = norms_left(z.double(), rest.double(), SCALE, ranks)
    exact = variance_curve(scores * norms if weighted else scores)
    # A variance of nearly nothing is a difference of numbers that are not.
    noise = 1e-5 * scores.square().sum(1).max().item()
    torch.testing.assert_close(curves[:, 0].double(), exact[:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(curves[:, 1].double(), exact[:, 1], rtol=1e-5, atol=noise)
