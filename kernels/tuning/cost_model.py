"""How long a launch will take, predicted from counts and published rates.

It ranks configurations and names what limits a kernel. It leaves out bank conflicts, partition
camping, and clocks that fall under load: a measurement is always better.

A processor works on the programs it holds at once. Per step of their loops each unit needs

    matrix   flops / rate                     the matrix unit, or the lanes for exact float32
    issue    instructions · warps / 4         four schedulers issue one instruction per cycle each
    shared   operand reads / 128              bytes that a processor's shared memory gives per cycle
    port     step bytes / 64                  bytes that reach a processor per cycle

cycles, and these overlap, so b programs on it take b times the largest, and a tenth of the others,
which does not overlap. But each program waits for its own data: with d steps in flight a step takes
latency / d at least. Programs come in waves of as many as fit on the chip; the last wave is as slow
as its fullest processor. That is the processors' time. It overlaps, as well as that, with the
chip's two other times, all bytes through the cache and all bytes from memory. What overlaps with
nothing is added: the launch, the first loads of every wave, and the launches that add up parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from memaop_triton.kernels.targets import Target
from memaop_triton.kernels.tuning.config import (
    Config,
    GemmConfig,
    Problem,
    RowConfig,
    occupancy,
    padded_rank,
    reads_shared,
    threads,
)

SCHEDULERS = 4  # instructions per cycle of an SM, SIMDs of a compute unit
PORT_BYTES = 64  # per cycle into an SM's (a compute unit's) first-level cache
SHARED_BYTES = 128  # per cycle out of its shared memory
SECTOR = 32  # bytes that memory hands out at least
UNHIDDEN = 0.1  # of the shorter of things that overlap
LATENCY = 0.7e-6  # seconds from a load to its data while the memory is busy
LAUNCH = 3e-6  # seconds between the ends of two kernels that do nothing


@dataclass(frozen=True)
class Cost:
    """A prediction.

    Attributes:
        seconds: Of the launch and of those behind it that belong to it.
        limited_by: What takes most: "memory", "cache", "launches", "latency" or a unit of the
            processors ("matrix units", "instructions", "shared memory").
        idle: Part of the last wave's places that stay empty.
    """

    seconds: float
    limited_by: str
    idle: float


def predict(problem: Problem, config: Config, target: Target) -> Cost:
    """How long `problem` takes on a target's chip, in a configuration that fits on it."""
    work, chip = count_work(problem, config, target), target.chip
    beside = occupancy(problem, config, target)
    cycles = {
        "matrix units": _matrix_cycles(work, config, target),
        "instructions": work.instructions * config.num_warps / SCHEDULERS,
        "shared memory": work.operand_reads / SHARED_BYTES,
        "cache": work.step_bytes / PORT_BYTES,
    }
    each = _overlapped(*cycles.values())
    wait = LATENCY * 1e9 * chip.clock / work.depth
    at_once = beside * chip.processors
    full, rest = divmod(work.programs, at_once)
    last = max(_ceil_div(rest, chip.processors) * each, wait) if rest else 0.0
    busy = {
        "processors": work.steps * (full * max(beside * each, wait) + last) / (1e9 * chip.clock),
        "cache": work.programs * work.steps * work.step_bytes / chip.cache_rate,
        "memory": work.memory_bytes / chip.memory_rate,
    }
    # The row numbers or the first flags, then the first tile.
    fill = 2 * LATENCY * (full + (rest > 0)) if work.steps else 0.0
    outside = fill + sum(LAUNCH + _moved(size, target) for size in work.extra_bytes) + LAUNCH
    limit = _largest(busy | {"launches": outside})
    if limit == "processors":
        together = max(1.0, min(1.0, work.programs / at_once) * beside)
        limit = _largest({unit: together * n for unit, n in cycles.items()} | {"latency": wait})
    return Cost(
        seconds=_overlapped(*busy.values()) + outside,
        limited_by=limit,
        idle=(at_once - rest) / at_once if rest else 0.0,
    )


def _largest(times: dict[str, float]) -> str:
    return max(times, key=times.__getitem__)


def _overlapped(*times: float) -> float:
    longest = max(times)
    return longest + UNHIDDEN * (sum(times) - longest)


def _matrix_cycles(work: Work, config: Config, target: Target) -> float:
    """Cycles of one step's products.

    At the rate that large products reach in practice. Tiles too narrow for the newest instructions
    take those of a warp, which are no faster than on sm_80 (2,048 FLOPs per cycle in half
    precision, 1,024 in TF32). tcgen05 works on 128 rows, and is half idle with 64.
    """
    if not work.kind:
        return 0.0
    rate = float(target.chip.rate(work.kind))
    if work.kind == "single":
        return work.flops / rate
    if work.legacy:
        rate = min(rate, 2048 if work.kind == "half" else 1024)
    elif target.arch == 100 and getattr(config, "block_p", 128) < 128:
        rate /= 2
    return work.flops / (rate * target.chip.matrix_share)


def _moved(size: float, target: Target) -> float:
    """Seconds to move the result of the previous launch: half the cache may still hold it."""
    in_cache = size <= target.chip.cache * 2**19
    return size / (target.chip.cache_rate if in_cache else target.chip.memory_rate)


@dataclass(frozen=True)
class Work:
    """What a launch has to do.

    Attributes:
        programs: Number of programs.
        steps: Steps of a program's loop; what comes before and after counts as parts of a step.
        instructions: That each warp issues per step.
        step_bytes: Bytes that a program loads per step.
        memory_bytes: Bytes between memory and the chip, over the whole launch.
        extra_bytes: Bytes that each launch behind this one reads and writes.
        flops: Of one step, whole tiles counted.
        kind: Which unit multiplies, as in `Chip.rate`; "" if nothing is multiplied.
        legacy: Whether the tile is too narrow for the target's newest matrix instructions.
        operand_reads: Bytes of shared memory that the units read per step.
        depth: Steps that are in flight at once.
    """

    programs: int
    steps: float
    instructions: float
    step_bytes: float
    memory_bytes: float
    extra_bytes: tuple[float, ...] = ()
    flops: float = 0.0
    kind: str = ""
    legacy: bool = False
    operand_reads: float = 0.0
    depth: int = 1


class _Loop(NamedTuple):
    """Instructions per warp and step, fitted to the loops in bench/results/kernel_report.md."""

    base: float  # of a GEMM's loop that copies nothing and multiplies nothing
    copy: float  # per copy that a thread issues, its address included
    weight: float  # per element that is multiplied by a weight


_USUAL_LOOP = _Loop(50, 4, 1.3)
_LOOPS: dict[int | str, _Loop] = {
    90: _Loop(70, 4, 1.8),
    100: _Loop(90, 4, 2.2),
    "gfx942": _Loop(100, 9, 13),
    "gfx950": _Loop(30, 7, 9),
}


def count_work(problem: Problem, config: Config, target: Target) -> Work:
    """What a launch of `problem` has to do in one configuration."""
    if isinstance(config, GemmConfig):
        return _gemm(problem, config, target)
    if problem.kernel in ("project", "transposed_mm"):
        return _product(problem, config, target)
    return _pass_over_rows(problem, config, target)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _unit(problem: Problem) -> str:
    if problem.dtype != torch.float32:
        return "half"
    return "single" if problem.is_exact else "tf32"


def _gemm(problem: Problem, config: GemmConfig, target: Target) -> Work:
    """A gather GEMM: K rows, each program a tile of P×N and a share of the rows.

    Bytes per step: (block_n + block_p)·block_k·e. They come through the shared cache; see
    `_gemm_reads` for what is read from the memory behind it. A correction of rank q multiplies
    twice before the loop, like 2q more rows. With a split each program stores its float32 part, and
    a second launch adds them: 4·split·P·N bytes written, read again, and the result written in the
    dtype of X.
    """
    n, p = max(problem.n, 1), max(problem.p, 1)
    loaded = problem.dtype.itemsize
    steps = _ceil_div(_ceil_div(problem.k, config.block_k), config.split_k)
    correction = 2 * padded_rank(problem.rank) / config.block_k if problem.rank else 0.0
    out = problem.dtype.itemsize * problem.n * problem.p
    parts = 4 * config.split_k * n * p if config.split_k > 1 else 0
    exact = problem.is_exact and target.backend == "cuda"
    return Work(
        programs=_ceil_div(n, config.block_n) * _ceil_div(p, config.block_p) * config.split_k,
        steps=steps + correction,
        instructions=_gemm_instructions(problem, config, target),
        step_bytes=(config.block_n + config.block_p) * config.block_k * loaded,
        memory_bytes=_gemm_reads(problem, config, target, loaded) + (parts or out),
        extra_bytes=(parts + out,) if parts else (),
        flops=2 * config.block_n * config.block_p * config.block_k,
        kind=_unit(problem),
        legacy=reads_shared(problem, target) and (config.block_p < 64 or config.num_warps < 4),
        operand_reads=0.0 if exact else _operand_reads(problem, config, target),
        depth=max(1, config.num_stages - 1),
    )


def _gemm_reads(problem: Problem, config: GemmConfig, target: Target, loaded: int) -> float:
    """Bytes that a GEMM reads from memory.

    The selected rows once, K(N + P)·e in whole sectors. Programs that run at once walk down the
    rows together and share what they read; they cover `high` tiles along P and `wide` along N, in
    bands of `group`. So the rows are loaded once per such wave and tile, and of all but the
    first time the part comes from memory that the cache cannot keep.
    """
    n, p = max(problem.n, 1), max(problem.p, 1)
    tiles_n, tiles_p = _ceil_div(n, config.block_n), _ceil_div(p, config.block_p)
    once = problem.k * sum(_ceil_div(columns * loaded, SECTOR) * SECTOR for columns in (n, p))
    if once == 0:
        return 0.0
    room = max(1, occupancy(problem, config, target)) * target.processors
    together = max(1, min(tiles_n * tiles_p, room // config.split_k))
    group = min(config.group, tiles_p)
    high = min(tiles_p, group * _ceil_div(together, group * tiles_n))
    wide = min(tiles_n, _ceil_div(together, high))
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
    loop, count = _LOOPS.get(target.arch, _USUAL_LOOP), threads(config, target)
    operands = (config.block_n + config.block_p) * config.block_k / count
    area = config.block_n * config.block_p
    size = problem.dtype.itemsize
    if "blocks" in problem.flags:
        total = loop.base + 20
    else:
        total = loop.base + loop.copy * operands * (size / 16 if problem.is_aligned else 1)
    if "weighted" in problem.flags:
        total += loop.weight * config.block_p * config.block_k / count
    if problem.is_exact and target.backend == "cuda":
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


def _pass_over_rows(problem: Problem, config: RowConfig, target: Target) -> Work:
    """Scores, or the memory's update: every program owns block_m rows and walks over X, then G.

    It reads M(N + P)·e bytes; the memory's update also reads and writes the memory's rows (of the
    1 − K/M that are not multiplied elsewhere, where it leaves the others alone). Nothing is read
    twice. Column sums leave P float32 per program, which a second launch adds.
    """
    rows, size = problem.rows, problem.dtype.itemsize
    updates, sums = problem.kernel == "accumulate_and_score", "sums" in problem.flags
    kept = (problem.stored or problem.dtype).itemsize if updates else 0
    programs = max(1, _ceil_div(rows, config.block_m))
    each = config.block_m * config.block_c / threads(config, target)
    arithmetic = (20 if kept == 2 else 8) if updates else 2.5
    rest = 1 - problem.k / rows if "unscored" in problem.flags and problem.k < rows else 1.0
    moved = rest * rows * (problem.n + problem.p) * (size + 2 * kept)
    if sums:
        moved += (1 - rest) * rows * problem.p * size
    left = 4.0 * programs * problem.p if sums else 0.0
    width = min(config.block_c, max(problem.n, problem.p, 1))
    return Work(
        programs=programs,
        steps=sum(_ceil_div(c, config.block_c) for c in (problem.n, problem.p)),
        instructions=15 + each * arithmetic + (40 + 3 * each if sums else 0),
        step_bytes=config.block_m * width * (size + kept),
        memory_bytes=moved + left,
        extra_bytes=(left,) if sums else (),
    )


def _product(problem: Problem, config: RowConfig, target: Target) -> Work:
    """Z = XQ with norms, or AᵀZ: M·N·e read once, the narrow side from the cache for every tile.

    For Z = XQ M·q·e are written. For AᵀZ each share of the rows leaves 4·q bytes per column, which
    a launch adds; with norms every tile leaves 4 bytes per row, which another launch combines.
    """
    rows, n, size = problem.rows, max(problem.n, 1), problem.dtype.itemsize
    rank, tile = padded_rank(problem.rank), config.block_m * config.block_c
    tiles_m, tiles_n = _ceil_div(rows, config.block_m), _ceil_div(n, config.block_c)
    each = tile / threads(config, target)
    moved: float = rows * (n + problem.rank) * size
    extra: tuple[float, ...] = ()
    if problem.kernel == "project":
        programs, steps, along, width = max(1, tiles_m), tiles_n, config.block_c, config.block_m
        moved += n * problem.rank * size + 4 * rows
        norms = 4 * each
    else:
        programs, steps = tiles_n * config.split, _ceil_div(tiles_m, config.split)
        along, width = config.block_m, config.block_c
        has_norms = "norms" in problem.flags
        parts = 4.0 * config.split * n * problem.rank
        squares = 4.0 * tiles_n * rows if has_norms else 0.0
        moved = moved + parts + squares
        norms = 40 + 6 * each if has_norms else 0
        extra = (parts + 4 * n * problem.rank, *([squares + 8 * rows] if squares else []))
    step_bytes = (tile + along * rank) * size
    copies = step_bytes / threads(config, target) / (16 if problem.is_aligned else size)
    loop = _LOOPS.get(target.arch, _USUAL_LOOP)
    exact = problem.is_exact and target.backend == "cuda"
    lanes = 1.3 * tile * rank / threads(config, target) if exact else 0.0
    return Work(
        programs=programs,
        steps=steps,
        instructions=loop.base + loop.copy * copies + norms + lanes,
        step_bytes=step_bytes,
        memory_bytes=moved,
        extra_bytes=extra,
        flops=2.0 * tile * rank,
        kind=_unit(problem),
        legacy=reads_shared(problem, target) and width < 64,
        operand_reads=0.0 if exact else step_bytes,
        depth=max(1, config.num_stages - 1),
    )
