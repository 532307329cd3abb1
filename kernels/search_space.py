"""The configurations that tuning tries for a problem."""

from __future__ import annotations

from dataclasses import replace

import torch

from memaop_triton.kernels import configs
from memaop_triton.kernels.configs import Config, GemmConfig
from memaop_triton.kernels.problem import Problem
from memaop_triton.kernels.targets import Target


def candidates(problem: Problem, target: Target) -> tuple[Config, ...]:
    """The heuristic's choice first, then the listed tiles, split and not."""
    aligned = "uneven" not in problem.flags
    found: list[Config] = [configs.heuristic(problem, target)]
    if problem.kernel == "gather_gemm":
        tiles = configs.gemm_tiles(target, problem.dtype, problem.precision, aligned=aligned)
        found += _split(tiles, problem)
    elif problem.kernel == "residual_gemm":
        found += _split(configs.residual_tiles(target, problem.dtype, problem.precision), problem)
    elif problem.kernel == "project":
        found += configs.projection_tiles(problem.dtype, problem.rank, aligned=aligned)
    elif problem.kernel == "transposed_mm":
        for tile in configs.transposed_tiles(problem.dtype, problem.rank, aligned=aligned):
            found += [replace(tile, split=split) for split in (1, 4, 16)]
    else:
        rows, sums = range(2, 20), "sums" in problem.flags
        found += [configs.for_rows(target, 1 << i, sums) for i in rows]
    return tuple(dict.fromkeys(found))


def _split(tiles: tuple[GemmConfig, ...], problem: Problem) -> list[GemmConfig]:
    if "accumulate" in problem.flags or problem.dtype == torch.float32:
        tiles = tuple(tile for tile in tiles if tile.block_n <= 128)
    return [
        replace(tile, split_k=split)
        for tile in tiles
        for split in (1, 2, 4, 8, 16, 32)
        if split == 1 or split * 8 * tile.block_k <= problem.k
    ]
