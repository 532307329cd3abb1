"""The work of the GEMMs of selected rows, gathered or formed while they are loaded."""

from __future__ import annotations

from memaop_triton.kernels.targets import Target
from memaop_triton.kernels.tuning.config import GemmConfig
from memaop_triton.kernels.tuning.footprint import (
    is_exact,
    occupancy,
    padded_rank,
    reads_shared,
    threads,
)
from memaop_triton.kernels.tuning.problem import Problem
from memaop_triton.kernels.tuning.work import Work, ceil_div, loop_of, unit_of

SECTOR = 32  # bytes that memory hands out at least


def _row_bytes(columns: int, size: int) -> int:
    """Bytes that memory hands out for a row that stands alone."""
    return ceil_div(columns * size, SECTOR) * SECTOR


def gemm(problem: Problem, config: GemmConfig, target: Target) -> Work:
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
    tiles_n, tiles_p = ceil_div(n, config.block_n), ceil_div(p, config.block_p)
    area = config.block_n * config.block_p
    operands = (config.block_n + config.block_p) * config.block_k
    steps = ceil_div(ceil_div(k, config.block_k), config.split_k)
    correction = 2 * padded_rank(problem.rank) / config.block_k if problem.rank else 0.0
    out = _out_bytes(problem)
    parts = 4 * config.split_k * n * p if config.split_k > 1 else 0
    exact = is_exact(problem) and target.backend == "cuda"
    return Work(
        programs=tiles_n * tiles_p * config.split_k,
        steps=steps + correction,
        flops=2 * area * config.block_k,
        kind=unit_of(problem),
        legacy=reads_shared(problem, target) and (config.block_p < 64 or config.num_warps < 4),
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
    tiles_n, tiles_p = ceil_div(n, config.block_n), ceil_div(p, config.block_p)
    once = problem.k * (_row_bytes(n, loaded) + _row_bytes(p, loaded))
    if once == 0:
        return 0.0
    room = max(1, occupancy(problem, config, target)) * target.processors
    together = max(1, min(tiles_n * tiles_p, room // config.split_k))
    group = min(config.group, tiles_p)
    high = min(tiles_p, group * ceil_div(together, group * tiles_n))
    wide = min(tiles_n, ceil_div(together, high))
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
    loop, count = loop_of(target), threads(config, target)
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
