"""The plain GEMMs among the kernels that are looked at."""

from __future__ import annotations

import functools

import torch

from bench.microscope.cases import Case, K, N, P, compared_tiles, empty
from memaop_triton.bench.suites.plain_gemm import descriptor_gemm, pointer_gemm
from memaop_triton.kernels.targets import Target


def plain_cases(target: Target) -> list[Case]:
    """A plain GEMM for each half-precision tile of the gather GEMM, with the ways it gathers."""
    given = {"x": empty(K, N, dtype=torch.bfloat16), "g": empty(K, P, dtype=torch.bfloat16)}
    ways = {"plain by pointers": pointer_gemm}
    if target.has_tensor_copies:
        ways["plain by descriptors"] = descriptor_gemm
    found = []
    for title, gemm in ways.items():
        for weighted_rows in (False, True):
            extra = {"weights": empty(K, dtype=torch.float32)} if weighted_rows else {}
            for c in compared_tiles(target):
                call = functools.partial(
                    gemm,
                    **given,
                    **extra,
                    tile=(c.block_p, c.block_n, c.block_k),
                    num_warps=c.num_warps,
                    num_stages=c.num_stages,
                )
                name = title + ", weighted" * weighted_rows
                found.append(Case(name, c, call, torch.bfloat16))
    return found
