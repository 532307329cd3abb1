"""What a launch has to do, kernel by kernel: the counts that `cost_model.py` turns into time.

M rows, K of them multiplied, N columns of X, P of G, rank q. `e` is the size of an element.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from memaop_triton.kernels.config_types import Config, GemmConfig, RowConfig
from memaop_triton.kernels.footprint import (
    is_exact,
    occupancy,
    padded_rank,
    reads_shared,
    threads,
)
from memaop_triton.kernels.problem import Problem
from memaop_triton.kernels.targets import Target

SECTOR = 32  # bytes that memory hands out at least


@dataclass(frozen=True)
class Work:
    """A launch, counted.

    Attributes:
        programs: Number of programs.
        steps: Steps of a program's loop; what comes before and after counts as parts of a step.
        flops: Of one step, whole tiles counted.
        kind: Which unit multiplies, as in `Chip.rate`; "" if nothing is multiplied.
        legacy: Whether the tile is too narrow for the target's newest matrix instructions.
        instructions: That each warp issues per step.
        operand_reads: Bytes of shared memory that the units read per step.
        step_bytes: Bytes that a program loads per step.
        depth: Steps that are in flight at once.
        memory_bytes: Bytes between memory and the chip, over the whole launch.
        extra_bytes: Bytes that each launch behind this one reads and writes.
    """

    programs: int
    steps: float
    flops: float
    kind: str
    legacy: bool
    instructions: float
    operand_reads: float
    step_bytes: float
    depth: int
    memory_bytes: float
    extra_bytes: tuple[float, ...] = field(default=())


@dataclass(frozen=True)
class _Loop:
    """Instructions per warp and step, fitted to the loops in bench/results/kernel_report.md.

    Attributes:
        base: Of a GEMM's loop that copies nothing and multiplies nothing.
        copy: Per copy that a thread issues, its address included.
        weight: Per element that is multiplied by a weight.
        formed: Per element of an operand that is formed while loading.
    """

    base: float
    copy: float
    weight: float
    formed: float


_LOOPS = {
    "cuda": _Loop(50, 4, 1.3, 13),
    "sm_90": _Loop(70, 4, 1.8, 11),
    "sm_100": _Loop(90, 4, 2.2, 36),
    "gfx942": _Loop(100, 9, 13, 22),
    "gfx950": _Loop(30, 7, 9, 16),
}


def _loop_of(target: Target) -> _Loop:
    return _LOOPS.get(target.name, _LOOPS["cuda"])


def work(problem: Problem, config: Config, target: Target) -> Work:
    """Count a launch of `problem` in one configuration.

    Raises:
        TypeError: The configuration is not one of this kernel's.
    """
    kind, count = _KERNELS[problem.kernel]
    if not isinstance(config, kind):
        raise TypeError(f"config of {problem.kernel} must be a {kind.__name__}, got {config!r}.")
    return count(problem, config, target)


def _unit(problem: Problem) -> str:
    if problem.dtype != torch.float32:
        return "half"
    return "single" if is_exact(problem) else "tf32"


def _row_bytes(columns: int, size: int) -> int:
    """Bytes that memory hands out for a row that stands alone."""
    return -(-columns * size // SECTOR) * SECTOR


def _gemm(problem: Problem, config: GemmConfig, target: Target) -> Work:
    """A gather GEMM: K rows, each program a tile of P×N and a share of the rows.

    Bytes per step: (block_n + block_p)·block_k·e, with the memory's rows besides where operands are
    formed while loading. They come through the shared cache; see `_gemm_memory` for what reaches
    the memory behind it. A correction of rank q multiplies twice before the loop, like 2q more
    rows. With a split each program stores its float32 part, and a second launch adds them:
    4·split·P·N bytes written, read again, and the result written.
    """
    n, p, k = max(problem.n, 1), max(problem.p, 1), problem.k
    formed = problem.kernel == "residual_gemm"
    size = problem.dtype.itemsize
    loaded = size + ((problem.stored or problem.dtype).itemsize if formed else 0)
    tiles_n, tiles_p = -(-n // config.block_n), -(-p // config.block_p)
    area = config.block_n * config.block_p
    operands = (config.block_n + config.block_p) * config.block_k
    steps = -(-(-(-k // config.block_k)) // config.split_k)
    correction = 2 * padded_rank(problem.rank) / config.block_k if problem.rank else 0.0
    out = _out_bytes(problem)
    parts = 4 * config.split_k * n * p if config.split_k > 1 else 0
    exact = is_exact(problem) and target.backend == "cuda"
    return Work(
        programs=tiles_n * tiles_p * config.split_k,
        steps=steps + correction,
        flops=2 * area * config.block_k,
        kind=_unit(problem),
        legacy=reads_shared(problem, target) and config.block_p < 64,
        instructions=_gemm_instructions(problem, config, target),
        operand_reads=0.0 if exact else _operand_reads(problem, config, target),
        step_bytes=operands * loaded,
        depth=max(1, config.num_stages - 1),
        memory_bytes=_gemm_memory(problem, config, target, loaded) + (parts or out),
        extra_bytes=(parts + out,) if parts else (),
    )


def _out_bytes(problem: Problem) -> int:
    """Of dW: in the dtype of X, or added to a float32 gradient."""
    each = 8 if "accumulate" in problem.flags else problem.dtype.itemsize
    return each * problem.n * problem.p


def _gemm_memory(problem: Problem, config: GemmConfig, target: Target, loaded: int) -> float:
    """Bytes that a GEMM reads from memory.

    The selected rows once, K(N + P)·e in whole sectors. Programs that run at once walk down the
    rows together and share what they read; they cover `high` tiles along P and `wide` along N, in
    bands of `group`. So the rows are asked for once per such wave and tile, and of all but the
    first time the part comes from memory that the cache cannot keep.
    """
    n, p = max(problem.n, 1), max(problem.p, 1)
    tiles_n, tiles_p = -(-n // config.block_n), -(-p // config.block_p)
    once = problem.k * (_row_bytes(n, loaded) + _row_bytes(p, loaded))
    if once == 0:
        return 0.0
    room = max(1, occupancy(problem, config, target)) * target.processors
    together = max(1, min(tiles_n * tiles_p, room // config.split_k))
    group = min(config.group, tiles_p)
    high = min(tiles_p, group * -(-together // (group * tiles_n)))
    wide = min(tiles_n, -(-together // high))
    waves = tiles_n * tiles_p / together
    columns = min(high * config.block_p, p) + min(wide * config.block_n, n)
    asked = max(once, waves * problem.k * columns * loaded)
    kept = min(1.0, target.chip.cache * 2**20 / once)
    return once + (asked - once) * (1 - kept)


def _gemm_instructions(problem: Problem, config: GemmConfig, target: Target) -> float:
    """Loop overhead, copies, matrix instructions with their operands, and arithmetic on operands.

    A copy takes 16 bytes per thread, or one element where rows are not aligned. Exact float32
    products on NVIDIA are one instruction per lane and product, and a third for operands.
    """
    loop, count = _loop_of(target), threads(config, target)
    operands = (config.block_n + config.block_p) * config.block_k / count
    area = config.block_n * config.block_p
    size = problem.dtype.itemsize
    if problem.kernel == "residual_gemm":
        total = loop.base + loop.formed * operands
    elif "blocks" in problem.flags:
        total = loop.base + 20
    else:
        total = loop.base + loop.copy * operands * (size / 16 if problem.is_aligned else 1)
    if "weighted" in problem.flags:
        total += loop.weight * config.block_p * config.block_k / count
    if is_exact(problem) and target.backend == "cuda":
        return total + 1.3 * area * config.block_k / count
    if reads_shared(problem, target):
        return total
    depth = {"cuda": 32, "hip": 64}[target.backend] / size
    return total + 1.3 * area * config.block_k / (config.num_warps * 128 * depth)


def _operand_reads(problem: Problem, config: GemmConfig, target: Target) -> float:
    """Bytes of shared memory per step: each warp (group of four on sm_90) reads what it multiplies.

    Warps that lie side by side read the same rows of an operand, so squarer arrangements read less.
    On sm_100 one thread multiplies for the program, and each operand is read once.
    """
    size = problem.dtype.itemsize
    x = config.block_n * config.block_k * size
    g = config.block_p * config.block_k * size
    if target.arch == 100 and reads_shared(problem, target):
        return x + g
    units, high = config.num_warps, 16
    if target.arch == 90 and reads_shared(problem, target):
        units, high = max(1, config.num_warps // 4), 64
    choices = [1 << i for i in range(units.bit_length())]
    fitting = [rows for rows in choices if rows * high <= max(config.block_p, high)]
    return min(rows * x + units / rows * g for rows in fitting)


def _rows(problem: Problem, config: RowConfig, target: Target) -> Work:
    """A pass over rows: every program owns block_m rows and walks over the columns of X, then G.

    It reads M(N + P)·e bytes; the memory's update also reads and writes the memory's rows (of the
    1 − K/M that are not multiplied elsewhere, where it leaves the others alone). Nothing is read
    twice. Column sums leave P float32 per program, which a second launch adds.
    """
    rows, columns = problem.rows, problem.n + problem.p
    size = problem.dtype.itemsize
    updates = problem.kernel == "accumulate_and_score"
    kept = (problem.stored or problem.dtype).itemsize if updates else 0
    sums = "sums" in problem.flags
    programs = max(1, -(-rows // config.block_m))
    steps = sum(-(-c // config.block_c) for c in (problem.n, problem.p))
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
        step_bytes=config.block_m * min(config.block_c, max(columns, 1)) * (size + kept),
        depth=1,
        memory_bytes=moved + left,
        extra_bytes=(left,) if sums else (),
    )


def _projection(problem: Problem, config: RowConfig, target: Target) -> Work:
    """Z = XQ with norms: M·N·e read once, M·q·e written; Q comes from the cache for every tile."""
    rows, n, size = problem.rows, max(problem.n, 1), problem.dtype.itemsize
    rank = padded_rank(problem.rank)
    steps = -(-n // config.block_c)
    tile, side = config.block_m * config.block_c, config.block_c * rank
    return _streamed(
        problem,
        config,
        target,
        programs=max(1, -(-rows // config.block_m)),
        steps=steps,
        width=config.block_m,
        step_bytes=(tile + side) * size,
        memory_bytes=rows * (n + problem.rank) * size + n * problem.rank * size + 4 * rows,
    )


def _transposed(problem: Problem, config: RowConfig, target: Target) -> Work:
    """AᵀZ: M·N·e read once, Z from the cache for every tile of columns.

    Each share of the rows leaves 4·q bytes per column, and a launch adds them. With norms every
    tile leaves 4 bytes per row, which another launch combines.
    """
    rows, n, size = problem.rows, max(problem.n, 1), problem.dtype.itemsize
    rank = padded_rank(problem.rank)
    tiles = -(-n // config.block_c)
    tile, side = config.block_m * config.block_c, config.block_m * rank
    parts = 4.0 * config.split * n * problem.rank
    squares = 4.0 * tiles * rows if "norms" in problem.flags else 0.0
    return _streamed(
        problem,
        config,
        target,
        programs=tiles * config.split,
        steps=-(-(-(-rows // config.block_m)) // config.split),
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
    loop, count = _loop_of(target), threads(config, target)
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
        kind=_unit(problem),
        legacy=reads_shared(problem, target) and width < 64,
        instructions=instructions,
        operand_reads=0.0 if exact else step_bytes,
        step_bytes=step_bytes,
        depth=max(1, config.num_stages - 1),
        memory_bytes=memory_bytes,
        extra_bytes=extra_bytes,
    )


_KERNELS = {
    "row_scores": (RowConfig, _rows),
    "accumulate_and_score": (RowConfig, _rows),
    "project": (RowConfig, _projection),
    "transposed_mm": (RowConfig, _transposed),
    "gather_gemm": (GemmConfig, _gemm),
    "residual_gemm": (GemmConfig, _gemm),
}
