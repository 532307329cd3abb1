"""Speed-up against ratio, speed-up against width, time against rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from memaop_triton.bench.report import text
from memaop_triton.bench.report.data import Case, Method
from memaop_triton.bench.report.fits import Power
from memaop_triton.bench.report.methods import base_name, ordered, series
from memaop_triton.bench.report.plot import NARROW, Axis, Plot, Sample, Series
from memaop_triton.bench.report.svg import Drawing

SHAPES = {
    "default": "circle",
    "priority": "square",
    "topk": "diamond",
    "topk-residual": "up",
    "topk-signed": "down",
}


def shape_of(method: Method) -> str:
    """The mark of a method, so that colour is not all that tells them apart."""
    return SHAPES.get(base_name(method) or "", "circle")


def methods_of(cases: Sequence[Case], roles: Sequence[str] = ("ours", "baseline")) -> list[Method]:
    """One method per name among the cases, in the order of tables and charts."""
    found = {
        name: method
        for case in cases
        for name, method in case.methods.items()
        if method.role in roles
    }
    return ordered(list(found.values()))


def _lines(
    cases: Sequence[Case],
    x: Callable[[Case], float],
    sample: Callable[[Case, Method, float], Sample],
    roles: Sequence[str],
) -> list[Series]:
    lines = []
    for method in methods_of(cases, roles):
        at = sorted((case for case in cases if method.name in case.methods), key=x)
        samples = [sample(case, case.methods[method.name], x(case)) for case in at]
        plain = method.role == "baseline"
        shape = "" if plain else shape_of(method)
        lines.append(Series(method.name, series(method), samples, shape, band=not plain))
    return lines


def _speed(case: Case, method: Method, x: float) -> Sample:
    speed = method.speedup
    tip = (
        f"{method.name}, {case.shape}, r = {text.ratio(case.ratio)}: "
        f"{text.times(speed.median)} ({text.span(speed.q1, speed.q3)})"
    )
    return Sample(x, speed.median, speed.q1, speed.q3, tip)


def _speed_axis(lines: Sequence[Series], highest: float = 1) -> Axis:
    samples = [one for line in lines for one in line.samples]
    low = min([1.0, *(one.low for one in samples)])
    high = max([highest, 2.0, *(one.high for one in samples)])
    return Axis("speed-up over dense, ×", low * 0.9, high * 1.08, tick=_speed_tick)


def _speed_tick(value: float) -> str:
    return f"{value:g}×" if value >= 1 else f"1/{1 / value:g}×"


def _height(width: float) -> float:
    return 330 if width < NARROW else 360


def by_ratio(cases: Sequence[Case]) -> Callable[[float], Drawing]:
    """Speed-up against K/M for one shape, beside the 1/r that no overhead at all would give."""

    def draw(width: float) -> Drawing:
        lines = _lines(cases, lambda case: 1 / case.ratio, _speed, ("ours", "baseline"))
        inverses = sorted({1 / case.ratio for case in cases})
        low, high = inverses[0], inverses[-1]
        ideal = [Sample(one, one, one, one, "") for one in (low, high)]
        lines.append(Series("ideal 1/r", "s-ideal", ideal, "", band=False))
        x = Axis("rows computed, K/M", low * 0.93, high * 1.07, tick=_ratio_tick)
        label = f"Speed-up against ratio at {cases[0].shape}"
        return _draw(width, label, x, _speed_axis(lines, high), lines)

    return draw


def _ratio_tick(value: float) -> str:
    return f"1/{value:g}" if value > 1 else f"{value:g}"


def by_width(cases: Sequence[Case]) -> Callable[[float], Drawing]:
    """Speed-up against N for one M and ratio."""

    def draw(width: float) -> Drawing:
        lines = _lines(cases, lambda case: float(case.n), _speed, ("ours", "baseline"))
        sizes = [case.n for case in cases]
        x = Axis("width N", min(sizes) * 0.9, max(sizes) * 1.1)
        return _draw(width, "Speed-up against width", x, _speed_axis(lines), lines)

    return draw


def by_rows(cases: Sequence[Case], fits: Mapping[str, Power | None]) -> Callable[[float], Drawing]:
    """Milliseconds against M; where there is room, names carry the fitted exponents."""

    def draw(width: float) -> Drawing:
        lines = [
            line if width < NARROW else replace(line, name=_with_exponent(line.name, fits))
            for line in _lines(
                cases, lambda case: float(case.m), _time, ("dense", "ours", "baseline")
            )
        ]
        samples = [one for line in lines for one in line.samples]
        low, high = min(one.low for one in samples), max(one.high for one in samples)
        sizes = [case.m for case in cases]
        x = Axis("rows M", min(sizes) * 0.9, max(sizes) * 1.1)
        y = Axis("time of a call, ms", low * 0.8, high * 1.25, base=10)
        return _draw(width, "Time against the number of rows", x, y, lines)

    return draw


def _with_exponent(name: str, fits: Mapping[str, Power | None]) -> str:
    fit = fits.get(name)
    return name if fit is None else f"{name} {fit.exponent:.2f}"


def _time(case: Case, method: Method, x: float) -> Sample:
    tip = f"{method.name}, {case.shape}: {text.duration(method.ms.median)}"
    return Sample(x, method.ms.median, method.ms.q1, method.ms.q3, tip)


def _draw(width: float, label: str, x: Axis, y: Axis, lines: Sequence[Series]) -> Drawing:
    plot = Plot(width, _height(width), label, x, y, [line.name for line in lines])
    if y.low < 1 < y.high and y.base == 2:
        plot.drawing.line(plot.at(x.low, 1), plot.at(x.high, 1), "one")
    # Ours over the baselines.
    for line in reversed(lines):
        plot.add(line)
    plot.label_ends(lines)
    return plot.drawing
