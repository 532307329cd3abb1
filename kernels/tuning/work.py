"""What a launch has to do: the counts that `cost_model.py` turns into time.

`gemm_work.py` counts the GEMMs of selected rows, `row_work.py` what reads all rows once. M rows, K
of them multiplied, N columns of X, P of G, rank q; `e` is the size of an element.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memaop_triton.kernels.targets import Target
from memaop_triton.kernels.tuning.footprint import is_exact
from memaop_triton.kernels.tuning.problem import Problem


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


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
    extra_bytes: tuple[float, ...] = ()


@dataclass(frozen=True)
class Loop:
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
    "cuda": Loop(50, 4, 1.3, 13),
    "sm_90": Loop(70, 4, 1.8, 11),
    "sm_100": Loop(90, 4, 2.2, 36),
    "gfx942": Loop(100, 9, 13, 22),
    "gfx950": Loop(30, 7, 9, 16),
}


def loop_of(target: Target) -> Loop:
    """What instructions cost on a target."""
    return _LOOPS.get(target.name, _LOOPS["cuda"])


def unit_of(problem: Problem) -> str:
    """Which unit multiplies, as in `Chip.rate`."""
    if problem.dtype != torch.float32:
        return "half"
    return "single" if is_exact(problem) else "tf32"
