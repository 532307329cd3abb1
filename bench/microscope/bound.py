"""What limits a kernel's inner loop.

These are predictions from static counts and vendors' peak rates. Nothing here was timed: latency,
cache misses, bank conflicts and clocks below the boost clock are all left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.microscope.compiling import Compiled
from bench.microscope.counts import Counts, LoopCounts, copy_bits
from bench.microscope.dots import Dot, loop_dots
from memaop_triton.kernels.targets import TARGETS

SCHEDULERS = 4  # instructions per cycle of an SM, SIMDs of a compute unit
CACHE_BYTES = 64  # from L2 per cycle to one SM (compute unit)


CHIPS = {name: target.chip for name, target in TARGETS.items()}


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
