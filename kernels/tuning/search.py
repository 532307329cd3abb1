"""The configurations that are worth measuring for a problem.

Every kernel has a grid of tiles that it accepts. Dropped are tiles that do not fit on a processor,
those that the model predicts to take twice as long as the best, and further variations of a tile.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, replace

import torch

from memaop_triton.kernels.targets import Target
from memaop_triton.kernels.tuning import defaults
from memaop_triton.kernels.tuning.config import (
    Config,
    GemmConfig,
    Problem,
    RowConfig,
    occupancy,
    padded_rank,
    reads_shared,
)
from memaop_triton.kernels.tuning.cost_model import predict

MOST = 40
ALIKE = {8: 4}  # of the same sides, by `group`; otherwise one
SLOWER = 2.0  # than the best, as predicted
SMALLEST_SIDE = 16  # of a matrix instruction


def candidates(problem: Problem, target: Target) -> tuple[Config, ...]:
    """The configurations to measure, the best by `cost_model.predict` first.

    At most 40, all different, all fitting on a processor of the target, the choice of
    `defaults.heuristic` among them. The order depends on nothing but the arguments.
    """
    chosen = defaults.heuristic(problem, target)
    every = {*_grid(problem, target), *defaults.tiles(problem, target)}
    split = {one for tile in every for one in defaults.splits(problem, tile, target)}
    ranked = sorted(
        (
            (predict(problem, config, target).seconds, config)
            for config in split
            if occupancy(problem, config, target)
        ),
        key=lambda one: (one[0], astuple(one[1])),
    )
    limit = SLOWER * ranked[0][0]
    alike: Counter[tuple[int, int, int]] = Counter()
    kept = []
    for seconds, config in ranked:
        kind = _kind(config)
        if config == chosen or (seconds <= limit and alike[kind] < ALIKE.get(kind[2], 1)):
            alike[kind] += 1
            kept.append(config)
    surplus = [config for config in kept if config != chosen][MOST - 1 :]
    return tuple(config for config in kept if config not in surplus)


def _kind(config: Config) -> tuple[int, int, int]:
    if isinstance(config, GemmConfig):
        return config.block_n, config.block_p, config.group
    return config.block_m, config.block_c, 8


def _grid(problem: Problem, target: Target) -> Iterator[Config]:
    if problem.kernel == "gather_gemm":
        return _gemms(problem, target)
    if problem.kernel in ("project", "transposed_mm"):
        return _products(problem, target)
    return _passes(problem, target)


def _powers(low: int, high: int) -> list[int]:
    return [1 << i for i in range(low.bit_length() - 1, high.bit_length())]


def _side(most: int, columns: int) -> list[int]:
    """Sides of a tile for so many columns, of which at most half of a tile is unused."""
    sides = _powers(SMALLEST_SIDE, most)
    return [side for side in sides if side // 2 < columns or side == SMALLEST_SIDE]


def _gemms(problem: Problem, target: Target) -> Iterator[GemmConfig]:
    """Sides from 16 to 256, steps of 32 to 256 bytes of a row, two to eight warps.

    Each thread copies at least 16 bytes of either operand; with less, threads would copy the same
    bytes. Exact float32 products are kept narrow: Triton 3.7 multiplies computed operands of 64 and
    more columns of G as tf32 on sm_100.
    """
    size, exact = problem.dtype.itemsize, problem.is_exact
    blocks = "blocks" in problem.flags
    sides_n = _side(64 if exact else 256, problem.n)
    sides_p = _side(32 if exact else 256, problem.p)
    depths = _powers(16, 32) if exact else _powers(32 if size == 2 else 16, 128 // size * 2)
    stages = (2, 3) if target.backend == "hip" else (2, 3, 4, 5)
    columns_first = not blocks and _columns_first(problem, target)
    warpgroup = reads_shared(problem, target)  # four warps multiply together
    numbers = (4, 8) if warpgroup else (2, 4, 8)
    for n, p, k, warps, depth in itertools.product(sides_n, sides_p, depths, numbers, stages):
        if min(n, p) * k * size < 16 * warps * target.warp_size:
            continue
        tile = GemmConfig(n, p, k, warps, depth, x_columns_first=columns_first)
        yield tile
        if problem.is_aligned and not (blocks or exact) and n >= 64:
            yield replace(tile, tiles_n=2)
        if n * p >= 128 * 128:
            yield from (replace(tile, group=group) for group in (4, 16))


def _columns_first(problem: Problem, target: Target) -> bool:
    """As in the shipped tiles: matrix units that read shared memory take X in this order."""
    if not problem.is_aligned:
        return target.arch != 80
    return problem.dtype != torch.float32 and reads_shared(problem, target)


def _passes(problem: Problem, target: Target) -> Iterator[RowConfig]:
    """Up to 64 rows and 1,024 columns, 16 bytes to 64 elements per thread, half of it of two."""
    size = problem.dtype.itemsize
    most = 32 if problem.kernel == "accumulate_and_score" else 64
    columns = max(problem.n, problem.p, 1)
    for rows, width, warps in itertools.product(_powers(1, 64), _powers(64, 1024), (2, 4, 8)):
        each = rows * width / (warps * target.warp_size)
        if 16 / size <= each <= most and (width // 2 < columns or width == 64):
            yield RowConfig(rows, width, warps)


def _products(problem: Problem, target: Target) -> Iterator[RowConfig]:
    """Tiles of 16 to 128 rows; the matrix units need 16 along every dimension.

    Exact float32 products keep sums and operands in the registers of their thread, so that few fit.
    """
    size, exact = problem.dtype.itemsize, problem.is_exact
    most = 64 if exact else 128
    rank = padded_rank(problem.rank)
    widths = [w for w in _powers(32, 256) if w // 2 < problem.n or w == 32]
    for rows, width, warps, stages in itertools.product(
        _powers(SMALLEST_SIDE, most), widths, (4, 8), (2, 3, 4)
    ):
        threads = warps * target.warp_size
        side = rows if problem.kernel == "project" else width
        held = side * rank / threads if exact else 0
        if 16 / size <= rows * width / threads <= (32 if exact else 64) and held <= 32:
            yield RowConfig(rows, width, warps, stages)
