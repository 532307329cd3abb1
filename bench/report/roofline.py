"""The roofline: what the machine's measured rates allow at every arithmetic intensity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memaop_triton.bench.report import text
from memaop_triton.bench.report.charts import shape_of
from memaop_triton.bench.report.data import Case, Machine, Method
from memaop_triton.bench.report.methods import ordered, series, traffic
from memaop_triton.bench.report.plot import NARROW, Axis, Plot
from memaop_triton.bench.report.svg import CHARACTER, Drawing


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


def roofline(found: Sequence[Call], machine: Machine, dtype: str) -> Callable[[float], Drawing]:
    """Roofs as lines and calls as marks, all of one dtype, whose rate the machine must have."""

    def draw(width: float) -> Drawing:
        rate, bandwidths = machine.gemm_gflops[dtype], _bandwidths(machine)
        fastest = max(bandwidths.values())
        ridge = rate / fastest
        low = min(ridge, *(call.intensity for call in found)) / 2
        high = max(ridge, *(call.intensity for call in found)) * 2
        slowest = min(low * fastest, *(call.gflops for call in found))
        x = Axis("useful FLOPs per byte moved", low, high)
        top = max(rate, *(call.gflops for call in found))
        y = Axis("useful GFLOP/s", slowest * 0.8, top * 1.5, 2 if top < 64 * slowest else 10)
        height = 380 if width < NARROW else 430
        plot = Plot(width, height, f"Roofline of {machine.name}, {dtype}", x, y, [], top=54)
        for name, bandwidth in bandwidths.items():
            start, end = max(low, y.low / bandwidth), min(high, rate / bandwidth)
            slope = [plot.at(start, start * bandwidth), plot.at(end, end * bandwidth)]
            plot.drawing.path(slope, f"line s-roof {name}")
        plot.drawing.path([plot.at(ridge, rate), plot.at(high, rate)], "line s-roof")
        right, above = plot.at(high, rate)
        plot.drawing.text(
            (right, above - 8), f"GEMM {text.rate(rate, 'FLOP')}", "name s-dense", "end"
        )
        for call in found:
            at = plot.at(call.intensity, call.gflops)
            css = f"dot open {series(call.method)}"
            plot.drawing.mark(at, shape_of(call.method), css, _tip(call), 4.5)
        _name_slopes(plot, bandwidths)
        _name_marks(plot, found)
        return plot.drawing

    return draw


def _bandwidths(machine: Machine) -> dict[str, float]:
    rates = {"read": machine.stream_gbs, "update": machine.triad_gbs}
    return {name: rate for name, rate in rates.items() if rate is not None}


def _tip(call: Call) -> str:
    return (
        f"{call.method.name}, {call.case.shape}, r = {text.ratio(call.case.ratio)}: "
        f"{text.rate(call.gflops, 'FLOP')}, {text.percent(call.gflops / call.roof)} of the roof"
    )


def _name_slopes(plot: Plot, bandwidths: dict[str, float]) -> None:
    """Above the axes."""
    x, y = plot.x.start, 34.0
    for name, rate in bandwidths.items():
        what = f"{name} {text.rate(rate, 'B')}"
        plot.drawing.line((x, y - 4), (x + 18, y - 4), f"line s-roof {name}")
        plot.drawing.text((x + 24, y), what, "name s-dense")
        x += 44 + CHARACTER * len(what)


def _name_marks(plot: Plot, found: Sequence[Call]) -> None:
    """At the lower right, under the roofs."""
    named = {call.method.name: call.method for call in found}
    dense = [method for method in named.values() if method.role == "dense"]
    methods = dense + ordered([method for method in named.values() if method.role == "ours"])
    left = plot.x.end - max(len(method.name) for method in methods) * CHARACTER - 14
    for i, method in enumerate(reversed(methods)):
        y = plot.y.start - 12 - 17 * i
        plot.drawing.mark((left, y - 4), shape_of(method), f"dot open {series(method)}", "", 4.5)
        plot.drawing.text((left + 10, y), method.name, f"name {series(method)}")
