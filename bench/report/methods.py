"""A description of every method: its distribution, its source, and its unavoidable traffic.

Costs are those of one weight gradient. The unit is one pass over X and G together, M(N+P) elements:
the pass that scores the rows, the memory's reads and writes in it, and the GEMM's own operands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from memaop_triton import MemAOPConfig
from memaop_triton.bench.report.data import Case, Machine, Method

PAPER = "https://arxiv.org/abs/2110.09164"
# Units read and written besides the GEMM's operands, by memory.
_PASS_UNITS = {"none": 1.0, "subspace": 1.5, "residual": 3.0}


@dataclass(frozen=True)
class Definition:
    """What a method is.

    Attributes:
        text: In a sentence.
        unbiased: Whether the mean of its gradient over draws is dense's.
        memory: `none`, `subspace` or `residual` (rows): what is kept, which decides the traffic.
    """

    text: str
    unbiased: bool
    memory: str


# In the order of tables and charts.
OURS = {
    "default": Definition(
        "Rows drawn by priority sampling from what a subspace of the inputs leaves over; the "
        "subspace's share is computed exactly.",
        True,
        "subspace",
    ),
    "priority": Definition(
        "K rows by priority sampling (Duffield, Lund, Thorup 2007), no memory.", True, "none"
    ),
    "topk": Definition("The K rows of largest score, no memory.", False, "none"),
    "topk-residual": Definition(
        "The K rows of largest score; the others are kept for the next step, as in the paper.",
        False,
        "residual",
    ),
    "topk-signed": Definition(
        "As `topk-residual`, with a random sign per row and step, so that cross terms average out.",
        False,
        "residual",
    ),
    "int8": Definition(
        "As `default`; the inputs of layers are kept in 8 bits a number until the backward pass.",
        True,
        "subspace",
    ),
    "int4": Definition("As `int8`, in 4 bits a number.", True, "subspace"),
    "int4-all": Definition(
        "All rows, without a memory, from inputs kept in 4 bits a number.", True, "none"
    ),
    "saved": Definition(
        "Dense; what operations save for the backward pass is kept in 8 bits a number, rounded at "
        "random (`compress_saved`).",
        True,
        "none",
    ),
    "int4-saved": Definition("As `int4` and `saved` at once.", True, "subspace"),
}
BASELINES = {
    "authors": Definition(
        "The formulation of the Mem-AOP-GD authors' code: memories copied and masked whole.",
        False,
        "residual",
    ),
    "crs": Definition(
        "K draws with replacement, probability in proportion to the score (Drineas, Kannan, "
        "Mahoney 2006).",
        True,
        "none",
    ),
    "bernoulli-crs": Definition(
        "Every row on its own with its own probability, K expected (Adelman et al. 2021).",
        True,
        "none",
    ),
    "bernoulli-crs-code": Definition("The same as its authors' code has it.", True, "none"),
    "topk-crs": Definition(
        "The K rows of largest score, unscaled (Adelman et al. 2021).", False, "none"
    ),
    "topk-compiled": Definition("The same through `torch.compile`.", False, "none"),
    "vcas": Definition(
        "Poisson sampling of rows and a gather (Wang et al., VCAS, 2024).", True, "none"
    ),
    "wta-crs": Definition(
        "The largest rows always, the rest by draws with replacement (Liu et al., WTA-CRS, 2023).",
        True,
        "none",
    ),
    "checkpoint": Definition(
        "Every block is computed once more in the backward pass, from its input (activation "
        "checkpointing).",
        True,
        "none",
    ),
    "forward-wta": Definition(
        "K rows of a layer's inputs are drawn in the forward pass by their norms alone, as by "
        "`wta-crs`, and only these are kept.",
        True,
        "none",
    ),
    "saved-int8": Definition(
        "Everything that autograd saves is rounded to the nearest of 8 bits, a scale for each row, "
        "by saved-tensor hooks.",
        False,
        "none",
    ),
}


def base_name(method: Method) -> str | None:
    """The key of `OURS` or `BASELINES` that a method stands for, `None` if it is in neither.

    Names of our methods may include how the input gradient is computed: `default, sampled dX`.
    """
    name = method.name.partition(",")[0]
    return name if name in {"ours": OURS, "baseline": BASELINES}.get(method.role, {}) else None


def definition(method: Method) -> Definition | None:
    """The description of a method, `None` without one."""
    key = base_name(method)
    return None if key is None else (OURS | BASELINES)[key]


def rank(method: Method) -> tuple[bool, int, str]:
    """Sorts into the order of tables and charts: ours, then baselines, unknown ones last."""
    known, key = list(OURS | BASELINES), base_name(method)
    order = len(known) if key is None else known.index(key)
    return method.role != "ours", order, method.name


def ordered(methods: list[Method]) -> list[Method]:
    """Methods in that order."""
    return sorted(methods, key=rank)


def methods_of(cases: Sequence[Case], roles: Sequence[str] = ("ours", "baseline")) -> list[Method]:
    """One method per name among the cases, in the order of tables and charts."""
    found = {
        name: method
        for case in cases
        for name, method in case.methods.items()
        if method.role in roles
    }
    return ordered(list(found.values()))


@dataclass(frozen=True)
class Traffic:
    """What one weight gradient has to compute and to move.

    Attributes:
        flops: Useful floating-point operations.
        pass_bytes: Moved by the pass over all rows, the memory included.
        gemm_bytes: The GEMM's operands.
        updates: Whether the pass writes as well.
    """

    flops: float
    pass_bytes: float
    gemm_bytes: float
    updates: bool

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / (self.pass_bytes + self.gemm_bytes)

    def roof(self, machine: Machine, dtype: str) -> float:
        """GFLOP/s if the pass over the rows and the GEMM overlapped wholly."""
        return min(machine.gemm_gflops[dtype], self.intensity * machine.stream_gbs)

    def milliseconds(self, machine: Machine, dtype: str) -> tuple[float, float]:
        """(pass, GEMM) at the machine's measured rates."""
        bandwidth = machine.triad_gbs if self.updates else machine.stream_gbs
        rate = machine.gemm_gflops[dtype]
        return self.pass_bytes / bandwidth / 1e6, self.flops / rate / 1e6


def traffic(case: Case, method: Method) -> Traffic | None:
    """Costs of a dense call or one of ours; `None` where they are not counted."""
    unit = float(case.m) * (case.n + case.p) * getattr(torch, case.dtype).itemsize
    if method.role == "dense":
        return Traffic(2.0 * case.m * case.n * case.p, 0.0, unit, False)
    what = definition(method)
    if method.role != "ours" or what is None:
        return None
    flops = 2.0 * case.k * case.n * case.p
    if what.memory == "subspace":
        flops += 2.0 * case.m * MemAOPConfig().rank_for(case.m, case.n, case.p) * (case.n + case.p)
    passed = _PASS_UNITS[what.memory] * unit
    return Traffic(flops, passed, case.k / case.m * unit, what.memory == "residual")
