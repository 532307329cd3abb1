"""The work of what reads all rows once: scores, the memory's update, and narrow products."""

from __future__ import annotations

from memaop_triton.kernels.targets import Target
from memaop_triton.kernels.tuning.config import RowConfig
from memaop_triton.kernels.tuning.footprint import is_exact, padded_rank, reads_shared, threads
from memaop_triton.kernels.tuning.problem import Problem
from memaop_triton.kernels.tuning.work import Work, ceil_div, loop_of, unit_of


def passes(problem: Problem, config: RowConfig, target: Target) -> Work:
    """A pass over rows: every program owns block_m rows and walks over the columns of X, then G.

    It reads M(N + P)·e bytes; the memory's update also reads and writes the memory's rows (of the
    1 − K/M that are not multiplied elsewhere, where it leaves the others alone). Nothing is read
    twice. Column sums leave P float32 per program, which a second launch adds.
    """
    rows, columns = problem.rows, problem.n + problem.p
    width = min(config.block_c, max(problem.n, problem.p, 1))
    size = problem.dtype.itemsize
    updates = problem.kernel == "accumulate_and_score"
    kept = (problem.stored or problem.dtype).itemsize if updates else 0
    sums = "sums" in problem.flags
    programs = max(1, ceil_div(rows, config.block_m))
    steps = sum(ceil_div(c, config.block_c) for c in (problem.n, problem.p))
    each = config.block_m * config.block_c / threads(config, target)
    arithmetic = (20 if kept == 2 else 8) if updates else 2.5
    rest = 1 - problem.k / rows if "unscored" in problem.flags and problem.k < rows else 1.0
    moved = rest * rows * columns * (size + 2 * kept)
    if sums:
        moved += (1 - rest) * rows * problem.p * size
    left = 4.0 * programs * problem.p if sums else 0.0
    return Work(
        programs=programs,
        steps=steps,
        flops=0.0,
        kind="",
        legacy=False,
        instructions=15 + each * arithmetic + (40 + 3 * each if sums else 0),
        operand_reads=0.0,
        step_bytes=config.block_m * width * (size + kept),
        depth=1,
        memory_bytes=moved + left,
        extra_bytes=(left,) if sums else (),
    )


def projection(problem: Problem, config: RowConfig, target: Target) -> Work:
    """Z = XQ with norms: M·N·e read once, M·q·e written; Q comes from the cache for every tile."""
    rows, n, size = problem.rows, max(problem.n, 1), problem.dtype.itemsize
    rank = padded_rank(problem.rank)
    steps = ceil_div(n, config.block_c)
    tile, side = config.block_m * config.block_c, config.block_c * rank
    return _streamed(
        problem,
        config,
        target,
        programs=max(1, ceil_div(rows, config.block_m)),
        steps=steps,
        width=config.block_m,
        step_bytes=(tile + side) * size,
        memory_bytes=rows * (n + problem.rank) * size + n * problem.rank * size + 4 * rows,
    )


def transposed(problem: Problem, config: RowConfig, target: Target) -> Work:
    """AᵀZ: M·N·e read once, Z from the cache for every tile of columns.

    Each share of the rows leaves 4·q bytes per column, and a launch adds them. With norms every
    tile leaves 4 bytes per row, which another launch combines.
    """
    rows, n, size = problem.rows, max(problem.n, 1), problem.dtype.itemsize
    rank = padded_rank(problem.rank)
    tiles = ceil_div(n, config.block_c)
    tile, side = config.block_m * config.block_c, config.block_m * rank
    parts = 4.0 * config.split * n * problem.rank
    squares = 4.0 * tiles * rows if "norms" in problem.flags else 0.0
    return _streamed(
        problem,
        config,
        target,
        programs=tiles * config.split,
        steps=ceil_div(ceil_div(rows, config.block_m), config.split),
        width=config.block_c,
        step_bytes=(tile + side) * size,
        memory_bytes=rows * (n + problem.rank) * size + parts + squares,
        extra_bytes=(parts + 4 * n * problem.rank, *([squares + 8 * rows] if squares else [])),
    )


def _streamed(
    problem: Problem,
    config: RowConfig,
    target: Target,
    *,
    programs: int,
    steps: float,
    width: int,
    step_bytes: float,
    memory_bytes: float,
    extra_bytes: tuple[float, ...] = (),
) -> Work:
    """A product of a large matrix that is read once with a narrow one."""
    loop, count = loop_of(target), threads(config, target)
    tile, rank = config.block_m * config.block_c, padded_rank(problem.rank)
    each = tile / count
    norms = {"project": 4 * each, "transposed_mm": 40 + 6 * each if "norms" in problem.flags else 0}
    copies = step_bytes / count / (16 if problem.is_aligned else problem.dtype.itemsize)
    instructions = loop.base + loop.copy * copies + norms[problem.kernel]
    exact = is_exact(problem) and target.backend == "cuda"
    if exact:
        instructions += 1.3 * tile * rank / count
    return Work(
        programs=programs,
        steps=steps,
        flops=2.0 * tile * rank,
        kind=unit_of(problem),
        legacy=reads_shared(problem, target) and width < 64,
        instructions=instructions,
        operand_reads=0.0 if exact else step_bytes,
        step_bytes=step_bytes,
        depth=max(1, config.num_stages - 1),
        memory_bytes=memory_bytes,
        extra_bytes=extra_bytes,
    )
