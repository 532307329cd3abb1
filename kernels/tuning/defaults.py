"""The configuration of a launch where nothing was measured: the model's choice among what ships."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from memaop_triton.kernels.targets import Target
from memaop_triton.kernels.tuning import cost_model, footprint, shipped_tiles
from memaop_triton.kernels.tuning.config import Config, GemmConfig, RowConfig
from memaop_triton.kernels.tuning.problem import Problem
from memaop_triton.kernels.tuning.shipped_tiles import (
    gemm_tiles,
    projection_tiles,
    residual_tiles,
    row_tiles,
    transposed_tiles,
)

__all__ = [
    "Config",
    "GemmConfig",
    "RowConfig",
    "for_gather_gemm",
    "for_projection",
    "for_residual_gemm",
    "for_rows",
    "for_transposed",
    "gemm_tiles",
    "heuristic",
    "projection_tiles",
    "residual_tiles",
    "row_tiles",
    "splits",
    "transposed_tiles",
]

MOST_PARTS = 32
LEAST_STEPS = 8


@functools.lru_cache(maxsize=1024)
def heuristic(problem: Problem, target: Target) -> Config:
    """The shipped tile that `cost_model.predict` ranks first, its rows split as the model says.

    It looks at the problem and the target and nothing else, so that every process of a run chooses
    alike, and it chooses only tiles that were compiled for the target and looked at. What decides:

    - A larger tile reads less through the cache, for each operand is read once per tile of the
      other; but a tile wider than the matrix multiplies what nobody stores, and few programs leave
      processors idle, or one program alone on the last wave.
    - Sharing the rows of a tile among programs fills the processors, and costs a second launch
      that reads 4 bytes per element of the result and part. A program keeps at least eight steps.
    - In a pass over rows, fewer rows per program make more programs; more rows leave fewer lines of
      column sums.

    Of equals the smaller tile is taken, and the smaller split.
    """
    ranked = [
        (cost_model.predict(problem, config, target).seconds, _size(config), i, config)
        for i, config in enumerate(
            split
            for tile in shipped_tiles.tiles(problem, target)
            for split in splits(problem, tile, target)
            if footprint.occupancy(problem, split, target)
        )
    ]
    return min(ranked, key=lambda one: one[:3])[3]


def splits(problem: Problem, tile: Config, target: Target) -> tuple[Config, ...]:
    """A tile with its rows split in every number of parts worth a thought, one part first."""
    if isinstance(tile, GemmConfig):
        programs = -(-max(problem.n, 1) // tile.block_n) * -(-max(problem.p, 1) // tile.block_p)
        most = problem.k // (LEAST_STEPS * tile.block_k)
        return tuple(replace(tile, split_k=s) for s in _parts(programs, most, target))
    if problem.kernel != "transposed_mm":
        return (tile,)
    programs = -(-max(problem.n, 1) // tile.block_c)
    most = problem.rows // (LEAST_STEPS * tile.block_m)
    return tuple(replace(tile, split=s) for s in _parts(programs, most, target))


def _parts(programs: int, most: int, target: Target) -> list[int]:
    """Powers of two, and the numbers that fill the processors once or twice."""
    filling = {waves * target.processors // programs for waves in (1, 2)}
    some = {1, *(1 << i for i in range(1, 6)), *filling}
    return sorted(s for s in some if s == 1 or 1 < s <= min(most, MOST_PARTS))


def _size(config: Config) -> int:
    if isinstance(config, GemmConfig):
        return config.block_n * config.block_p * config.block_k
    return config.block_m * config.block_c


def for_gather_gemm(
    target: Target,
    dtype: torch.dtype,
    precision: str,
    k: int,
    n: int,
    p: int,
    *,
    aligned: bool = True,
    accumulate: bool = False,
) -> GemmConfig:
    """The heuristic's tile of a gather GEMM of K rows."""
    flags = ("accumulate",) * accumulate + ("uneven",) * (not aligned)
    # Rows are told to be aligned where their number is not: they come in blocks, by descriptor.
    if aligned and (n % 16 or p % 16):
        flags = (*flags, "blocks")
    problem = Problem("gather_gemm", dtype, k, k, n, p, precision=precision, flags=flags)
    return _gemm(heuristic(problem, target))


def for_residual_gemm(
    target: Target, dtype: torch.dtype, precision: str, k: int, n: int, p: int
) -> GemmConfig:
    """The heuristic's tile of a residual GEMM of K rows."""
    problem = Problem("residual_gemm", dtype, k, k, n, p, stored=dtype, precision=precision)
    return _gemm(heuristic(problem, target))


def for_rows(target: Target, rows: int, sums: bool) -> RowConfig:
    """The heuristic's tile of a pass over rows of some thousand numbers."""
    flags = ("sums",) if sums else ()
    problem = Problem("row_scores", torch.bfloat16, rows, rows, 4096, 4096, flags=flags)
    return _rows(heuristic(problem, target))


def for_projection(
    target: Target, dtype: torch.dtype, rank: int, rows: int, *, aligned: bool = True
) -> RowConfig:
    """The heuristic's tile of Z = XQ for rows of some thousand numbers."""
    flags = () if aligned else ("uneven",)
    problem = Problem("project", dtype, rows, rows, 4096, 0, rank=rank, flags=flags)
    return _rows(heuristic(problem, target))


def for_transposed(
    target: Target,
    dtype: torch.dtype,
    rank: int,
    rows: int,
    columns: int,
    *,
    aligned: bool = True,
) -> RowConfig:
    """The heuristic's tile of AᵀZ."""
    flags = ("norms",) if aligned else ("norms", "uneven")
    problem = Problem("transposed_mm", dtype, rows, rows, columns, 0, rank=rank, flags=flags)
    return _rows(heuristic(problem, target))


def _gemm(config: Config) -> GemmConfig:
    assert isinstance(config, GemmConfig)
    return config


def _rows(config: Config) -> RowConfig:
    assert isinstance(config, RowConfig)
    return config
