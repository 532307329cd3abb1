"""What a program takes of a processor: shared memory, registers, and so how many fit beside it.

Estimates, made without a compiler; `tests/test_cost_model.py` holds them against what the compiler
reports. Shared memory is estimated from above, because a program that asks for more than there is
does not run.
"""

from __future__ import annotations

import torch

from memaop_triton.kernels.targets import Target
from memaop_triton.kernels.tuning.config import Config, GemmConfig, RowConfig
from memaop_triton.kernels.tuning.problem import Problem

KIB = 1 << 10


def padded_rank(rank: int) -> int:
    """Columns that a tile needs for `rank` of them: the matrix units want 16 at least."""
    return max(16, 1 << (rank - 1).bit_length())


def threads(config: Config, target: Target) -> int:
    """Threads of a program."""
    return config.num_warps * target.warp_size


def is_exact(problem: Problem) -> bool:
    """Whether float32 products are formed exactly, which NVIDIA's matrix units cannot."""
    return problem.dtype == torch.float32 and problem.precision == "ieee"


def reads_shared(problem: Problem, target: Target) -> bool:
    """Whether the matrix unit reads operands in shared memory itself (wgmma, tcgen05)."""
    return target.arch in (90, 100) and not is_exact(problem)


def shared_memory(problem: Problem, config: Config, target: Target) -> int:
    """Bytes of shared memory of one program, at most.

    A pipeline of s stages keeps s − 1 tiles of every operand in flight. Where the matrix unit reads
    shared memory itself, it still does so while the next tile arrives, which takes one more.
    Operands that are computed (weighted, summed) pass through shared memory once more, and so does
    the result on its way out, by halves on AMD, whose kernels keep the first stage in registers.
    """
    if isinstance(config, GemmConfig):
        whole = "accumulate" in problem.flags or config.split_k > 1
        size = 4 if whole else problem.dtype.itemsize
        leaving = config.block_n // config.tiles_n * config.block_p * size
        if target.backend == "hip":
            leaving //= 2
        return max(_gemm_shared(problem, config, target), leaving + KIB)
    tile = config.block_m * config.block_c * problem.dtype.itemsize
    if problem.kernel not in ("project", "transposed_mm"):
        return config.block_m * config.block_c * 4 + KIB
    along = config.block_c if problem.kernel == "project" else config.block_m
    side = along * padded_rank(problem.rank) * problem.dtype.itemsize
    stages = config.num_stages
    scratch = 5 * KIB  # sums across threads
    if target.backend == "hip":
        return (stages - 1) * (tile + side) + scratch
    in_registers = problem.kernel == "project" and target.arch != 100
    return (stages - in_registers) * tile + stages * side + scratch


def _gemm_shared(problem: Problem, config: GemmConfig, target: Target) -> int:
    size, stages = problem.dtype.itemsize, config.num_stages
    x = config.block_n * config.block_k * size
    g = config.block_p * config.block_k * size
    if problem.kernel == "residual_gemm":
        stored = problem.stored or problem.dtype
        loaded = (x + g) * (size + stored.itemsize) // size
        in_flight = stages - 2 if target.backend == "hip" else stages - 1
        return in_flight * loaded + x + g + KIB
    weights = stages * config.block_k * 4 + KIB
    if target.backend == "hip":
        return (stages - 1) * (x + g) + weights
    if is_exact(problem):
        return stages * (x + g) + weights
    if not reads_shared(problem, target):
        again = g if {"blocks", "weighted"} <= {*problem.flags} else 0
        return (stages - 1) * (x + g) + again + weights
    if "blocks" in problem.flags:
        return stages * (x + g) + (g if problem.dtype == torch.float32 else 0) + weights
    return stages * x + (stages - ("weighted" in problem.flags)) * g + weights


def registers(problem: Problem, config: Config, target: Target) -> int:
    """32-bit registers per thread, roughly: sums, operands on their way, addresses.

    Compilers use more where there are more, so this is nearer to what a program needs than to what
    it gets; above what a thread can have, values spill.
    """
    count = threads(config, target)
    size = problem.dtype.itemsize
    if isinstance(config, RowConfig):
        elements = config.block_m * config.block_c / count
        if problem.kernel in ("project", "transposed_mm"):
            side = config.block_m if problem.kernel == "project" else config.block_c
            sums = side * padded_rank(problem.rank) / count
            norms = problem.kernel == "project" or "norms" in problem.flags
            base = 36 if target.backend == "cuda" else 60
            return int(base + sums + elements * (0.5 + size / 8 if norms else 0.25))
        held = 2 if problem.kernel == "accumulate_and_score" else 1
        return int(20 + held * elements * (1 + size / 4))
    sums = config.block_n * config.block_p / count
    if "accumulate" in problem.flags:
        sums *= 2
    operands = (config.block_n + config.block_p) * config.block_k / count
    if problem.kernel == "residual_gemm":
        return int(48 + sums + operands * (size + 4) / 4)
    copies = operands * size / 16
    fragments = 0.0 if reads_shared(problem, target) else 32.0
    if target.arch == 100 and not is_exact(problem) and "accumulate" not in problem.flags:
        fragments -= 0.4 * sums  # they are in tensor memory until they are stored
    if "weighted" in problem.flags:
        fragments += config.block_p * config.block_k / count * size / 4
    if not problem.is_aligned:
        fragments += operands * (1 + size / 4)  # every element comes by itself, into a register
    return int(40 + sums + fragments + 3 * copies)


def occupancy(problem: Problem, config: Config, target: Target) -> int:
    """Programs on one processor at once; 0 if one alone does not fit."""
    shared = shared_memory(problem, config, target)
    held = registers(problem, config, target)
    if shared > target.shared_memory or held > target.thread_registers:
        return 0
    own = KIB if target.backend == "cuda" else 0
    rounded = -(-held // 8) * 8 * threads(config, target)
    return min(
        target.processor_shared_memory // (shared + own),
        target.processor_registers // rounded,
        target.processor_warps // config.num_warps,
        target.processor_programs,
    )
