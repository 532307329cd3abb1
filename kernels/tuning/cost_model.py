"""How long a launch will take: a prediction from counts and published rates.

It is there to rank configurations and to say what limits a kernel. It knows nothing of bank
conflicts, partition camping, clocks that fall under load or schedulers' moods; what it says of a
time is worth no more than the rates it starts from, and a measurement beats it always.

A processor works on the programs it holds at once. Per step of their loops each unit needs

    matrix   flops / rate                     the matrix unit, or the lanes for exact float32
    issue    instructions · warps / 4         four schedulers issue one instruction per cycle each
    shared   operand reads / 128              bytes that a processor's shared memory gives per cycle
    port     step bytes / 64                  bytes that reach a processor per cycle

cycles, and these overlap, so b programs on it take b times the largest, and a tenth of the others
for what does not. But each program waits for its own data: with d steps in flight a step takes
latency / d at least. Programs come in waves of as many as fit on the chip; the last wave is as slow
as its fullest processor. That is the processors' time. It overlaps, as well as that, with the
chip's two other times, all bytes through the cache and all bytes from memory. What overlaps with
nothing is added: the launch, the first loads of every wave, and the launches that add up parts.
"""

from __future__ import annotations

from dataclasses import dataclass

from memaop_triton.kernels.targets import Target
from memaop_triton.kernels.tuning import gemm_work, row_work
from memaop_triton.kernels.tuning.config import Config, GemmConfig, RowConfig
from memaop_triton.kernels.tuning.footprint import occupancy, registers, shared_memory
from memaop_triton.kernels.tuning.problem import Problem
from memaop_triton.kernels.tuning.work import Work

SCHEDULERS = 4  # instructions per cycle of an SM, SIMDs of a compute unit
PORT_BYTES = 64  # per cycle into an SM's (a compute unit's) first-level cache
SHARED_BYTES = 128  # per cycle out of its shared memory
UNHIDDEN = 0.1  # of the shorter of things that overlap
LATENCY = 0.7e-6  # seconds from a load to its data while the memory is busy
LAUNCH = 3e-6  # seconds between the ends of two kernels that do nothing


@dataclass(frozen=True)
class Cost:
    """A prediction, and what it is made of. Cycles are of one processor.

    Attributes:
        seconds: Of the launch and of those behind it that belong to it.
        matrix_cycles: Per step of one program, of the matrix unit.
        issue_cycles: Per step of one program, of the schedulers.
        shared_cycles: Per step of one program, of the shared memory.
        port_cycles: Per step of one program, of the way into the processor.
        wait_cycles: Per step, until its data are there.
        waves: Programs over those that run at once.
        idle: Part of the last wave's places that stay empty.
        processor_seconds: What the processors take for all waves.
        cache_bytes: Bytes through the shared cache.
        cache_seconds: What these take.
        memory_bytes: Bytes between memory and chip.
        memory_seconds: What these take.
        fill_seconds: Waiting for the first loads of every wave.
        reduction_seconds: The launches that add up what programs left.
        launch_seconds: Starting the kernel.
        shared_memory: Bytes per program.
        registers: Per thread.
        occupancy: Programs on one processor at once.
    """

    seconds: float
    matrix_cycles: float
    issue_cycles: float
    shared_cycles: float
    port_cycles: float
    wait_cycles: float
    waves: float
    idle: float
    processor_seconds: float
    cache_bytes: float
    cache_seconds: float
    memory_bytes: float
    memory_seconds: float
    fill_seconds: float
    reduction_seconds: float
    launch_seconds: float
    shared_memory: int
    registers: int
    occupancy: int

    @property
    def limited_by(self) -> str:
        """What takes most: "memory", "cache", "launches", "latency" or a unit of the processors."""
        outside = self.launch_seconds + self.fill_seconds + self.reduction_seconds
        times = {
            "processors": self.processor_seconds,
            "cache": self.cache_seconds,
            "memory": self.memory_seconds,
            "launches": outside,
        }
        largest = max(times, key=times.__getitem__)
        if largest != "processors":
            return largest
        beside = max(1.0, min(1.0, self.waves) * self.occupancy)
        units = {
            "matrix units": beside * self.matrix_cycles,
            "instructions": beside * self.issue_cycles,
            "shared memory": beside * self.shared_cycles,
            "cache": beside * self.port_cycles,
            "latency": self.wait_cycles,
        }
        return max(units, key=units.__getitem__)


def count_work(problem: Problem, config: Config, target: Target) -> Work:
    """What a launch of `problem` has to do in one configuration.

    Raises:
        TypeError: The configuration is not one of this kernel's.
    """
    if problem.kernel in ("gather_gemm", "residual_gemm"):
        if isinstance(config, GemmConfig):
            return gemm_work.gemm(problem, config, target)
    elif isinstance(config, RowConfig):
        return _ROW_WORK[problem.kernel](problem, config, target)
    raise TypeError(f"config={config!r} is not one of {problem.kernel}'s.")


_ROW_WORK = {
    "row_scores": row_work.passes,
    "accumulate_and_score": row_work.passes,
    "project": row_work.projection,
    "transposed_mm": row_work.transposed,
}


def predict(problem: Problem, config: Config, target: Target) -> Cost:
    """How long `problem` takes in one configuration on a target's chip.

    Raises:
        TypeError: The configuration is not one of this kernel's.
        ValueError: A program does not fit on a processor.
    """
    count, chip = count_work(problem, config, target), target.chip
    beside = occupancy(problem, config, target)
    if beside == 0:
        raise ValueError(f"{config} does not fit on a processor of {target.name}.")
    matrix = _matrix_cycles(count, config, target)
    issue = count.instructions * config.num_warps / SCHEDULERS
    shared = count.operand_reads / SHARED_BYTES
    port = count.step_bytes / PORT_BYTES

    at_once = beside * chip.processors
    full, rest = divmod(count.programs, at_once)
    wait = LATENCY * 1e9 * chip.clock / count.depth

    each = _overlapped(matrix, issue, shared, port)

    def step_cycles(programs: int) -> float:
        return max(programs * each, wait)

    last = -(-rest // chip.processors)
    cycles = count.steps * (full * step_cycles(beside) + (step_cycles(last) if rest else 0.0))
    processor_seconds = cycles / (1e9 * chip.clock)
    cache_bytes = count.programs * count.steps * count.step_bytes
    cache_seconds = cache_bytes / chip.cache_rate
    memory_seconds = count.memory_bytes / chip.memory_rate
    # The row numbers or the first flags, then the first tile.
    fill = 2 * LATENCY * (full + (rest > 0)) if count.steps else 0.0
    reduction = sum(LAUNCH + _moved(size, target) for size in count.extra_bytes)
    return Cost(
        seconds=_overlapped(processor_seconds, cache_seconds, memory_seconds)
        + (fill + reduction + LAUNCH),
        matrix_cycles=matrix,
        issue_cycles=issue,
        shared_cycles=shared,
        port_cycles=port,
        wait_cycles=wait,
        waves=count.programs / at_once,
        idle=(at_once - rest) / at_once if rest else 0.0,
        processor_seconds=processor_seconds,
        cache_bytes=cache_bytes,
        cache_seconds=cache_seconds,
        memory_bytes=count.memory_bytes + sum(count.extra_bytes),
        memory_seconds=memory_seconds,
        fill_seconds=fill,
        reduction_seconds=reduction,
        launch_seconds=LAUNCH,
        shared_memory=shared_memory(problem, config, target),
        registers=registers(problem, config, target),
        occupancy=beside,
    )


def _overlapped(*times: float) -> float:
    longest = max(times)
    return longest + UNHIDDEN * (sum(times) - longest)


def _matrix_cycles(count: Work, config: Config, target: Target) -> float:
    """Cycles of one step's products.

    At the rate that large products reach in practice. Tiles too narrow for the newest instructions
    take those of a warp, which are no faster than on sm_80 (2,048 FLOPs per cycle in half
    precision, 1,024 in TF32). tcgen05 works on 128 rows, and is half idle with 64.
    """
    if not count.kind:
        return 0.0
    rate = float(target.chip.rate(count.kind))
    if count.kind == "single":
        return count.flops / rate
    if count.legacy:
        rate = min(rate, 2048 if count.kind == "half" else 1024)
    elif target.arch == 100 and getattr(config, "block_p", 128) < 128:
        rate /= 2
    return count.flops / (rate * target.chip.matrix_share)


def _moved(size: float, target: Target) -> float:
    """Seconds to move what the launch before has just left: half the cache may still hold it."""
    in_cache = size <= target.chip.cache * 2**19
    return size / (target.chip.cache_rate if in_cache else target.chip.memory_rate)
