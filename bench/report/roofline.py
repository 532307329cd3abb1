"""The roofline: what the machine's measured rates allow at every arithmetic intensity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memaop_triton.bench.report.data import Case, Machine, Method
from memaop_triton.bench.report.methods import traffic


@dataclass(frozen=True)
class Call:
    """A measured call.

    Attributes:
        case: Its shape and ratio.
        method: What ran.
        intensity: Useful FLOPs over the bytes that have to move.
        gflops: Useful GFLOP/s.
        roof: GFLOP/s if the pass over the rows and the GEMM overlapped wholly.
    """

    case: Case
    method: Method
    intensity: float
    gflops: float
    roof: float


def calls(cases: Sequence[Case], machine: Machine) -> list[Call]:
    """The calls of dense and of ours whose traffic is counted, on a machine with measured rates."""
    found = []
    for case in cases:
        rate = machine.gemm_gflops.get(case.dtype)
        for method in [*case.of_role("dense"), *case.of_role("ours")]:
            cost = traffic(case, method)
            if cost is None or rate is None or machine.stream_gbs is None:
                continue
            roof = min(rate, cost.intensity * machine.stream_gbs)
            gflops = cost.flops / method.ms.median / 1e6
            found.append(Call(case, method, cost.intensity, gflops, roof))
    return found
