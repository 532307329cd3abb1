"""The configuration of a launch that was not tuned: the model's choice among the shipped tiles.

Every shipped tile is compiled for every target: `make kernel-report` shows the result, and
`tests/compile` checks that there are no spills, that shared memory is within the chip's, and that
the newest matrix instructions and copies of 16 bytes are used.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from memaop_triton.kernels.targets import Target
from memaop_triton.kernels.tuning.config import Config, GemmConfig, Problem, RowConfig, occupancy
from memaop_triton.kernels.tuning.cost_model import predict

MOST_PARTS = 32
LEAST_STEPS = 8


@functools.lru_cache(maxsize=1024)
def heuristic(problem: Problem, target: Target) -> Config:
    """The shipped tile that `cost_model.predict` ranks first, its rows split as the model says.

    It depends on the problem and the target alone, so that every process of a run chooses the same,
    and it chooses only tiles that were compiled and checked for the target. What decides:

    - A larger tile reads less through the cache, because each operand is read once per tile of the
      other. But a tile wider than the matrix computes numbers that are not stored, and few programs
      leave processors idle, or one program alone in the last wave.
    - Sharing the rows of a tile among programs fills the processors, and costs a second launch
      that reads 4 bytes per element of the result and part. A program keeps at least eight steps.
    - In a pass over rows, fewer rows per program make more programs; more rows leave fewer lines of
      column sums.

    Of equals the smaller tile is taken, and the smaller split.
    """
    ranked = [
        (predict(problem, config, target).seconds, _size(config), i, config)
        for i, config in enumerate(
            split
            for tile in tiles(problem, target)
            for split in splits(problem, tile, target)
            if occupancy(problem, split, target)
        )
    ]
    return min(ranked, key=lambda one: one[:3])[3]


def splits(problem: Problem, tile: Config, target: Target) -> tuple[Config, ...]:
    """A tile with its rows split into each number of parts that may be best, one part first."""
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


def for_rows(target: Target, rows: int, sums: bool) -> RowConfig:
    """The heuristic's tile of a pass over rows of some thousand numbers."""
    flags = ("sums",) if sums else ()
    problem = Problem("row_scores", torch.bfloat16, rows, rows, 4096, 4096, flags=flags)
    config = heuristic(problem, target)
    assert isinstance(config, RowConfig)
    return config


def tiles(problem: Problem, target: Target) -> tuple[Config, ...]:
    """The shipped tiles for a problem on a target, none of them split."""
    aligned = problem.is_aligned
    if problem.kernel == "gather_gemm":
        return gemm_tiles(target, problem.dtype, problem.precision, aligned=aligned)
    if problem.kernel == "project":
        return projection_tiles(problem.dtype, problem.rank, aligned=aligned)
    if problem.kernel == "transposed_mm":
        return transposed_tiles(problem.dtype, problem.rank, aligned=aligned)
    return row_tiles(sums="sums" in problem.flags)


def gemm_tiles(
    target: Target, dtype: torch.dtype, precision: str, *, aligned: bool = True
) -> tuple[GemmConfig, ...]:
    """The tiles of the gather GEMM on a target, largest first.

    Operands that are not aligned are copied through registers, a few bytes at a time: steps are
    half as deep then, and more warps share them.
    """
    if not aligned:
        tiles = gemm_tiles(target, dtype, precision)
        return tuple(_shallow(target, tile) for tile in tiles if tile.block_n <= 128)
    if dtype == torch.float32:
        return _TILES_IEEE if precision == "ieee" else _tf32_tiles(target)
    if target.backend == "hip":
        return _TILES_AMD
    if target.shared_memory < 128 << 10:
        return _TILES_SMALL_SHARED
    if target.arch == 80:
        return _TILES_HALF
    # wgmma and tcgen05 take 128 columns whole, but for the narrow tile on sm_90.
    pieces = (2, 1, 2 if target.arch == 90 else 1, 1, 1, 1)
    return tuple(
        replace(tile, tiles_n=count, x_columns_first=True)
        for tile, count in zip((_TILE_WIDE, *_TILES_HALF), pieces, strict=True)
    )


def _shallow(target: Target, tile: GemmConfig) -> GemmConfig:
    area = tile.block_n * tile.block_p
    return replace(
        tile,
        block_k=min(tile.block_k, max(16, tile.block_k // 2)),
        num_warps=8 if area >= 128 * 64 else tile.num_warps,
        tiles_n=1,
        x_columns_first=target.arch != 80 or area < 128 * 128,
    )


_TILE_WIDE = GemmConfig(256, 128, 64, 8, 3, tiles_n=2)
_TILES_HALF = (
    GemmConfig(128, 128, 64, 8, 3, tiles_n=2),
    GemmConfig(128, 64, 64, 4, 3, tiles_n=2),
    GemmConfig(64, 64, 64, 4, 3),
    GemmConfig(32, 64, 64, 4, 3),
    GemmConfig(16, 64, 64, 4, 3),
)
# 99 KiB per program: shallower steps instead of narrower tiles. The first one in two pieces would
# spill on sm_86 and sm_89.
_TILES_SMALL_SHARED = (GemmConfig(128, 128, 32, 8, 3), *_TILES_HALF[1:])
_TILES_AMD = (
    GemmConfig(128, 128, 64, 8, 2),
    GemmConfig(128, 64, 64, 4, 2),
    GemmConfig(64, 64, 64, 4, 2),
    GemmConfig(32, 64, 64, 4, 2),
    GemmConfig(16, 64, 64, 2, 2),
)
_TILES_IEEE = (
    GemmConfig(64, 64, 16, 8, 2),
    GemmConfig(32, 32, 16, 4, 2),
    GemmConfig(16, 32, 16, 4, 2),
)


def _tf32_tiles(target: Target) -> tuple[GemmConfig, ...]:
    stages = 2 if target.backend == "hip" else 3
    large = 2 if target.shared_memory < 128 << 10 else 3
    return (
        GemmConfig(128, 128, 32, 8, large),
        GemmConfig(128, 64, 32, 4, stages),
        GemmConfig(64, 64, 32, 4, stages),
        GemmConfig(32, 64, 32, 4, stages),
        GemmConfig(16, 64, 32, 4, stages),
    )


def row_tiles(*, sums: bool) -> tuple[RowConfig, ...]:
    """The tiles of the passes over rows, fewest rows first.

    With column sums a program leaves one line of them, so it takes as many rows as it can.
    """
    return _ROWS_WITH_SUMS if sums else _ROWS


_ROWS = (RowConfig(4, 512, 4), RowConfig(8, 256, 4))
_ROWS_WITH_SUMS = (RowConfig(16, 128, 4), RowConfig(32, 128, 8), RowConfig(64, 64, 8))


def projection_tiles(
    dtype: torch.dtype, rank: int, *, aligned: bool = True
) -> tuple[RowConfig, ...]:
    """The tiles of Z = XQ for up to `rank` columns of Q, most rows first."""
    block_c = 32 if rank > 16 or not aligned else 64
    if dtype != torch.float32:
        block_c = 64 if rank > 32 or not aligned else 128
    warps = 8 if dtype == torch.float32 and rank > 32 else 4  # for the products without tf32
    tiles = [RowConfig(block_m, block_c, warps, 3) for block_m in (64, 32, 16)]
    if dtype != torch.float32 and aligned:
        tiles[-1] = replace(tiles[-1], block_c=128)  # 16 bytes of X for each of 256 threads
    return tuple(tiles if aligned else tiles[1:])


def transposed_tiles(
    dtype: torch.dtype, rank: int, *, aligned: bool = True
) -> tuple[RowConfig, ...]:
    """The tiles of Aᵀ Z for up to `rank` columns of Z, widest first."""
    block_m = (32 if dtype == torch.float32 else 64) // (2 if rank > 32 else 1)
    warps = 8 if dtype == torch.float32 and rank > 32 else 4
    wide = RowConfig(block_m, 128, warps, 3)
    narrow = replace(wide, block_c=64)
    return (wide, narrow) if aligned else (narrow,)
