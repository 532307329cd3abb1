"""How a kernel is cut into programs: one explicit choice per launch, made by a fixed rule.

A rule looks at the target and the shape and nothing else, so that every process of a run chooses
alike. The tiles a rule can choose are listed, so that all of them can be compiled and looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from memaop_triton.kernels.problem import Problem
from memaop_triton.kernels.targets import Target


@dataclass(frozen=True)
class GemmConfig:
    """A tile of the gather GEMMs.

    Attributes:
        block_n: Columns of X per program.
        block_p: Columns of G per program.
        block_k: Rows per step.
        split_k: Number of programs that share the rows of a tile.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
        group: Tiles along P that neighbouring programs cover before they move along N.
        tiles_n: Pieces in which the columns of X are loaded and multiplied: two narrow ones need
            fewer row addresses than a wide one.
        x_columns_first: Orientation in which X is loaded. Units that read both operands from shared
            memory want the columns first; those that read from registers want the rows first. The
            residual GEMM, which computes its operands, has only the first way.
    """

    block_n: int
    block_p: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    group: int = 8
    tiles_n: int = 1
    x_columns_first: bool = False


@dataclass(frozen=True)
class RowConfig:
    """A tile of the passes over rows.

    Attributes:
        block_m: Rows per program.
        block_c: Columns per step.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
        split: Number of programs that share the rows, for products over all rows.
    """

    block_m: int
    block_c: int
    num_warps: int
    num_stages: int = 2
    split: int = 1


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
_TILES_SMALL_SHARED = (
    GemmConfig(128, 128, 32, 8, 3),
    GemmConfig(128, 64, 64, 4, 3, tiles_n=2),
    GemmConfig(64, 64, 64, 4, 3),
    GemmConfig(32, 64, 64, 4, 3),
    GemmConfig(16, 64, 64, 4, 3),
)
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
    """The largest tile that occupies the GPU, with the rows split where even the smallest does not.

    A larger tile reads less: each operand is read once per tile of the other. But a tile wider than
    the matrix wastes its work, and fewer programs than processors leave some idle. With a split the
    parts cost P·N float32 each, so a program keeps at least eight steps.
    """
    tiles = gemm_tiles(target, dtype, precision, aligned=aligned)
    if accumulate:  # two tiles and what they are added to do not fit into the registers
        tiles = tuple(tile for tile in tiles if tile.block_n <= 128)
    return _occupying(target, tiles, k, n, p)


def for_residual_gemm(
    target: Target, dtype: torch.dtype, precision: str, k: int, n: int, p: int
) -> GemmConfig:
    """By the same rule, from tiles that leave registers for four operands."""
    return _occupying(target, residual_tiles(target, dtype, precision), k, n, p)


def residual_tiles(target: Target, dtype: torch.dtype, precision: str) -> tuple[GemmConfig, ...]:
    """The tiles of the fused residual GEMM on a target, largest first."""
    if dtype == torch.float32 and precision == "ieee":
        return _TILES_RESIDUAL_IEEE
    tiles = _TILES_RESIDUAL_AMD if target.backend == "hip" else _TILES_RESIDUAL
    if dtype == torch.float32:
        return tuple(replace(tile, block_k=tile.block_k // 2) for tile in tiles)
    return tiles


# From 64 columns of G on, Triton 3.7 multiplies computed float32 operands as tf32 on sm_100.
_TILES_RESIDUAL_IEEE = (
    GemmConfig(64, 32, 16, 8, 2),
    GemmConfig(32, 32, 32, 4, 2),
    GemmConfig(16, 32, 16, 4, 2),
)
_TILES_RESIDUAL = (
    GemmConfig(128, 64, 32, 8, 2),
    GemmConfig(64, 64, 32, 4, 2),
    GemmConfig(32, 64, 32, 4, 2),
    GemmConfig(16, 64, 64, 4, 2),
)
# Half the warps where they are twice as wide, so that each thread still copies 16 bytes.
_TILES_RESIDUAL_AMD = (
    GemmConfig(128, 64, 32, 4, 2),
    GemmConfig(64, 64, 32, 4, 2),
    GemmConfig(32, 64, 32, 2, 2),
    GemmConfig(16, 64, 64, 2, 2),
)


def _occupying(target: Target, tiles: tuple[GemmConfig, ...], k: int, n: int, p: int) -> GemmConfig:
    fitting = [tile for tile in tiles if _fits(tile, n, p)]

    def programs(tile: GemmConfig) -> int:
        return -(-n // tile.block_n) * -(-p // tile.block_p)

    busy = [tile for tile in fitting if programs(tile) >= target.processors]
    if busy:
        return busy[0]
    tile = max(fitting, key=lambda t: min(programs(t), target.processors))
    most = max(1, k // (8 * tile.block_k))
    return replace(tile, split_k=min(most, max(1, target.processors // programs(tile)), 32))


def _fits(tile: GemmConfig, n: int, p: int) -> bool:
    narrow = tile.block_n <= 16
    return (tile.block_n // 2 < max(n, 16) or narrow) and tile.block_p // 2 < max(p, 64)


def for_rows(target: Target, rows: int, sums: bool) -> RowConfig:
    """Rows per program for a pass over rows: enough programs, and long reads of every row.

    The column sums that a pass leaves per program weigh 4/block_m of what it reads per column, so
    with `sums` a program takes as many rows as leave two programs to each processor.
    """
    most = rows // (2 * target.processors)
    block_m = 4 if most < 8 else 8
    if sums:
        block_m = 64 if most >= 64 else 32 if most >= 32 else 16
    block_c = {4: 512, 8: 256, 16: 128, 32: 128, 64: 64}[block_m]
    return RowConfig(block_m, block_c, 4 if block_m < 32 else 8)


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


def for_projection(
    target: Target, dtype: torch.dtype, rank: int, rows: int, *, aligned: bool = True
) -> RowConfig:
    """Rows per program for Z = XQ: as many as a matrix unit takes, fewer where rows are few."""
    tiles = projection_tiles(dtype, rank, aligned=aligned)
    return next((t for t in tiles if rows >= t.block_m * target.processors), tiles[-1])


def transposed_tiles(
    dtype: torch.dtype, rank: int, *, aligned: bool = True
) -> tuple[RowConfig, ...]:
    """The tiles of Aᵀ Z for up to `rank` columns of Z, widest first."""
    block_m = (32 if dtype == torch.float32 else 64) // (2 if rank > 32 else 1)
    warps = 8 if dtype == torch.float32 and rank > 32 else 4
    wide = RowConfig(block_m, 128, warps, 3)
    narrow = replace(wide, block_c=64)
    return (wide, narrow) if aligned else (narrow,)


def for_transposed(
    target: Target,
    dtype: torch.dtype,
    rank: int,
    rows: int,
    columns: int,
    *,
    aligned: bool = True,
) -> RowConfig:
    """A tile of Aᵀ Z: narrow enough to share the columns, the rows split to occupy the GPU.

    A part weighs q float32 per column, so a share keeps at least 1,024 rows.
    """
    tiles = transposed_tiles(dtype, rank, aligned=aligned)
    tile = tiles[0] if columns >= tiles[0].block_c else tiles[-1]
    programs = -(-columns // tile.block_c)
    return replace(tile, split=max(1, min(2 * target.processors // programs, rows // 1024, 32)))


Config = GemmConfig | RowConfig


def heuristic(problem: Problem, target: Target) -> Config:
    """What a launch uses that nobody tuned: the rule of its kernel."""
    aligned = "uneven" not in problem.flags
    if problem.kernel == "gather_gemm":
        return for_gather_gemm(
            target,
            problem.dtype,
            problem.precision,
            problem.k,
            problem.n,
            problem.p,
            aligned=aligned,
            accumulate="accumulate" in problem.flags,
        )
    if problem.kernel == "residual_gemm":
        return for_residual_gemm(
            target, problem.dtype, problem.precision, problem.k, problem.n, problem.p
        )
    if problem.kernel == "project":
        return for_projection(target, problem.dtype, problem.rank, problem.rows, aligned=aligned)
    if problem.kernel == "transposed_mm":
        return for_transposed(
            target, problem.dtype, problem.rank, problem.rows, problem.n, aligned=aligned
        )
    return for_rows(target, problem.rows, "sums" in problem.flags)
