"""A launch: the problem, how it is cut into programs, and the resources that a program needs.

Registers and shared memory are estimated without a compiler;
`tests/kernels/tuning/test_cost_model.py` compares the estimates with what the compiler reports.
Shared memory is estimated from above, because a program that needs more than there is does not run.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace

import torch

from memaop_triton.kernels.targets import Target

KIB = 1 << 10


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
        x_columns_first: Orientation in which X is loaded. The columns come first for units that
            read both operands from shared memory, the rows for those that read from registers.
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


Config = GemmConfig | RowConfig


def in_words(config: Config) -> str:
    """The fields of a configuration in one line: "block_n=128 block_p=64 ..."."""
    return " ".join(f"{name}={int(value)}" for name, value in asdict(config).items())


@dataclass(frozen=True)
class Problem:
    """One launch of a kernel, as far as its configuration depends on it.

    Attributes:
        kernel: "gather_gemm", "project", ...: one of `cache.SOURCES`.
        dtype: Of X and G.
        rows: M, number of rows of X and G.
        k: Number of rows that are multiplied; M for a pass over all rows.
        n: Columns of X (of the operand, for a pass over one).
        p: Columns of G; 0 for a pass over one operand.
        rank: Columns of the subspace's basis; 0 for none.
        stored: Dtype of the row memory, `None` without one.
        precision: How float32 operands are multiplied, "ieee" or "tf32".
        flags: What else the kernel is specialised for, in alphabetical order: "blocks"
            (rows come in whole blocks, by descriptor), "norms", "signed" (rows of the memory get
            random signs), "sums", "uneven" (rows that are not aligned to 16 bytes), "unscored",
            "weighted".
        block_rows: Rows of a block with "blocks", a bound of what one step takes; 1 otherwise.
    """

    kernel: str
    dtype: torch.dtype
    rows: int
    k: int
    n: int
    p: int
    rank: int = 0
    stored: torch.dtype | None = None
    precision: str = "ieee"
    flags: tuple[str, ...] = ()
    block_rows: int = 1

    def bucketed(self) -> Problem:
        """The same with M and K rounded up to powers of two: batches of like size share a config.

        K = M stays so.
        """
        rows = _power_of_two(self.rows)
        k = rows if self.k == self.rows else min(rows, _power_of_two(self.k))
        return replace(self, rows=rows, k=k)

    @property
    def is_aligned(self) -> bool:
        """Whether copies can be 16 bytes wide: rows start aligned, and columns come in sixteens.

        Tiles that are copied by descriptor may be cut anywhere.
        """
        if "uneven" in self.flags:
            return False
        return "blocks" in self.flags or self.n % 16 == self.p % 16 == 0

    @property
    def is_exact(self) -> bool:
        """Whether float32 products are exact, which NVIDIA's matrix units do not support."""
        return self.dtype == torch.float32 and self.precision == "ieee"

    @property
    def key(self) -> str:
        """All fields in one line, for the cache: "bfloat16 M=16384 K=2048 N=4096 P=4096 ..."."""
        words = [str(self.dtype).removeprefix("torch.")]
        words += [f"M={self.rows}", f"K={self.k}", f"N={self.n}", f"P={self.p}"]
        if self.rank:
            words.append(f"rank={self.rank}")
        if self.stored is not None:
            words.append(f"stored={str(self.stored).removeprefix('torch.')}")
        if self.dtype == torch.float32:
            words.append(self.precision)
        if self.block_rows > 1:
            words.append(f"block_rows={self.block_rows}")
        return " ".join([*words, *self.flags])


# Every launch makes its problem; a cached one takes half a microsecond instead of two.
problem_of = functools.lru_cache(maxsize=4096)(Problem)


@functools.cache
def flags(**wanted: bool) -> tuple[str, ...]:
    """The flags that are set, as `Problem` has them: `flags(sums=True, norms=False)`."""
    return tuple(sorted(name for name, is_wanted in wanted.items() if is_wanted))


def padded_rank(rank: int) -> int:
    """Columns of a tile with `rank` of them: the matrix units need 16 at least."""
    return max(16, _power_of_two(rank))


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def threads(config: Config, target: Target) -> int:
    """Threads of a program."""
    return config.num_warps * target.warp_size


def reads_shared(problem: Problem, target: Target) -> bool:
    """Whether the matrix unit reads operands in shared memory itself (wgmma, tcgen05)."""
    return target.arch in (90, 100) and not problem.is_exact


def shared_memory(problem: Problem, config: Config, target: Target) -> int:
    """Bytes of shared memory of one program, at most.

    A pipeline of s stages keeps s − 1 tiles of every operand in flight. Where the matrix unit reads
    shared memory itself, it still does so while the next tile arrives, which takes one more.
    Operands that are computed (weighted, summed) pass through shared memory once more, and so does
    the result on its way out, by halves on AMD, whose kernels keep the first stage in registers.
    """
    if isinstance(config, GemmConfig):
        size = 4 if config.split_k > 1 else problem.dtype.itemsize
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
    weights = stages * config.block_k * 4 + KIB
    if target.backend == "hip":
        return (stages - 1) * (x + g) + weights
    if problem.is_exact:
        return stages * (x + g) + weights
    if not reads_shared(problem, target):
        again = g if {"blocks", "weighted"} <= {*problem.flags} else 0
        return (stages - 1) * (x + g) + again + weights
    if "blocks" in problem.flags:
        return stages * (x + g) + (g if problem.dtype == torch.float32 else 0) + weights
    return stages * x + (stages - ("weighted" in problem.flags)) * g + weights


def registers(problem: Problem, config: Config, target: Target) -> int:
    """32-bit registers per thread, roughly: sums, operands that are being loaded, addresses.

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
    operands = (config.block_n + config.block_p) * config.block_k / count
    copies = operands * size / 16
    fragments = 0.0 if reads_shared(problem, target) else 32.0
    if target.arch == 100 and not problem.is_exact:
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
