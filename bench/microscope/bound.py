"""What limits a kernel's inner loop.

These are predictions from static counts and vendors' peak rates. Nothing here was timed: latency,
cache misses, bank conflicts and clocks below the boost clock are all left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bench.microscope.compiling import Compiled
from bench.microscope.counts import Counts, LoopCounts, copy_bits
from bench.microscope.dots import Dot, loop_dots

SCHEDULERS = 4  # instructions per cycle of an SM, SIMDs of a compute unit
CACHE_BYTES = 64  # from L2 per cycle to one SM (compute unit)


@dataclass(frozen=True)
class Chip:
    """A chip's published dense peaks, in TFLOP/s with float32 accumulation.

    Attributes:
        name: The product.
        processors: Streaming multiprocessors (compute units).
        clock: GHz at which the vendor counts the matrix peaks.
        half: bfloat16 and float16 matrix products.
        tf32: TF32 matrix products; on chips without them, float32 matrix products.
        single: float32 without matrix instructions (NVIDIA) or with (AMD).
        single_clock: GHz of that peak, where the vendor counts it at another.
        bandwidth: Of its memory, in TB/s.
    """

    name: str
    processors: int
    clock: float
    half: float
    tf32: float
    single: float
    single_clock: float | None = None
    bandwidth: float = 0.0

    @property
    def memory_bytes(self) -> float:
        """Bytes from memory per cycle and processor, when all of them read."""
        return 1e3 * self.bandwidth / (self.processors * self.clock)

    def rate(self, kind: str) -> int:
        """FLOPs per cycle of one processor; `kind`: "half", "tf32" or "single"."""
        clock = (self.single_clock if kind == "single" else None) or self.clock
        peak = float(getattr(self, kind))
        return 1 << round(math.log2(1e3 * peak / (self.processors * clock)))


CHIPS = {
    "sm_80": Chip("A100 SXM", 108, 1.41, 312.0, 156.0, 19.5, bandwidth=2.039),
    "sm_86": Chip("RTX 3090 Ti", 84, 1.86, 80.0, 40.0, 40.0, bandwidth=1.008),
    "sm_89": Chip("RTX 4090", 128, 2.52, 165.2, 82.6, 82.6, bandwidth=1.008),
    "sm_90": Chip("H100 SXM", 132, 1.83, 989.4, 494.7, 66.9, 1.98, bandwidth=3.35),
    "sm_100": Chip("B200", 148, 1.86, 2250.0, 1125.0, 75.0, 1.98, bandwidth=8.0),
    "sm_120": Chip("RTX 5090", 170, 2.41, 209.5, 104.8, 104.8, bandwidth=1.792),
    "gfx942": Chip("MI300X", 304, 2.1, 1307.4, 653.7, 163.4, bandwidth=5.3),
    "gfx950": Chip("MI355X", 256, 2.4, 2516.6, 157.3, 157.3, bandwidth=8.0),
}


@dataclass(frozen=True)
class Bound:
    """Cycles that one iteration needs of each resource of an SM (compute unit), at least.

    Attributes:
        tensor: Of the matrix units; of the float32 lanes if there are no matrix instructions.
        issue: Of the schedulers, one instruction per cycle each.
        bytes: Of the way from the L2 cache or from memory.
    """

    tensor: float
    issue: float
    bytes: float

    @property
    def limited_by(self) -> str:
        """The resource that needs most cycles."""
        return max(("tensor", "issue", "bytes"), key=lambda name: float(getattr(self, name)))


def bound(
    compiled: Compiled, counts: Counts, step_bytes: int = 0, *, from_memory: bool = False
) -> Bound | None:
    """The bound of one iteration of the inner loop; `None` if there is no loop.

    Args:
        compiled: The kernel.
        counts: What was counted in it.
        step_bytes: Bytes that an iteration moves; if 0, what its copies move, in which values count
            once for every thread that loads them.
        from_memory: Whether they come from memory and not from the L2 cache.
    """
    loop = counts.loop
    if loop is None:
        return None
    dots = loop_dots(compiled.asm["ttgir"])
    chip = CHIPS[compiled.target.name]
    warps = compiled.threads // compiled.target.warp_size
    return Bound(
        tensor=sum(dot.flops / chip.rate(_kind(dot, loop)) for dot in dots),
        issue=loop.per_iteration * warps / SCHEDULERS,
        bytes=(step_bytes or _copied(loop, dots, compiled.threads))
        / (chip.memory_bytes if from_memory else CACHE_BYTES),
    )


def _kind(dot: Dot, loop: LoopCounts) -> str:
    if dot.dtype != "f32":
        return "half"
    tf32 = any("TF32" in name or "xf32" in name or "UTC" in name for name in loop.matrix)
    return "tf32" if tf32 else "single"


def _copied(loop: LoopCounts, dots: list[Dot], threads: int) -> float:
    """Bytes per iteration: what the threads copy, or the operands where descriptors do."""
    widths = {name: n for name, n in loop.copies.items() if name.rpartition(".")[2].isdigit()}
    threaded = sum(n * copy_bits(name) // 8 for name, n in widths.items()) * threads
    if widths.keys() == loop.copies.keys():
        return threaded / loop.iterations
    return sum((dot.m + dot.n) * dot.k * dot.bits // 8 for dot in set(dots))
