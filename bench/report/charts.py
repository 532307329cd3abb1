"""The charts of the report: speed-ups, times, the roofline, bars and the break-even map."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from scipy.optimize import isotonic_regression

from memaop_triton.bench.report import text
from memaop_triton.bench.report.analysis import Field, Power
from memaop_triton.bench.report.data import Case, Machine, Method, Spread
from memaop_triton.bench.report.figures import INK, PAPER, RULE, SOFT, colour, new_figure, styled
from memaop_triton.bench.report.methods import base_name, methods_of, rank, traffic

# A chart is as wide as a phone, nearly: a desktop shows two or three side by side.
_WIDTH = 390.0
_CHARACTER = 6.8  # average width of one of the charts' text
# Upper bounds of the break-even map's classes of speed-up; the style sheet has a colour for each.
_CLASSES = (0.5, 0.8, 1.0, 1.5, 3.0, 5.0)
# Marks as well, so that methods differ by more than colour.
_MARKS = {"default": "o", "priority": "s", "topk": "D", "topk-residual": "^", "topk-signed": "v"}


def _colour(method: Method) -> str:
    """Ours by name, all baselines alike."""
    if method.role == "baseline":
        return colour("baseline")
    name = base_name(method)
    return INK if method.role == "dense" or name is None else colour(name)


def _mark(method: Method) -> str:
    return _MARKS.get(base_name(method) or "", "o")


def _weight(method: Method) -> str:
    return "bold" if base_name(method) == "default" else "normal"


def _axes(
    height: float,
    *,
    left: float = 42,
    right: float = 4,
    top: float = 30,
    bottom: float = 44,
    width: float = _WIDTH,
) -> tuple[Figure, Axes]:
    """A figure and its axes, with margins in pixels."""
    figure = new_figure(width, height)
    size = (width - left - right) / width, (height - top - bottom) / height
    return figure, figure.add_axes((left / width, bottom / height, *size))


def _logarithmic(
    axes: Axes,
    side: str,
    label: str,
    *,
    base: float = 2,
    tick: Callable[[float], str] = text.axis,
) -> None:
    """Scale one axis, `x` or `y`; the label of `y` stands above it, where it reads easily."""
    axis = getattr(axes, f"{side}axis")
    getattr(axes, f"set_{side}scale")("log", base=base)
    axis.set_major_locator(LogLocator(base=base, numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: tick(value))
    if side == "x":
        axes.set_xlabel(label)
    else:
        axes.figure.text(0, 1, label, color=SOFT, va="top")


def _curves(
    axes: Axes,
    cases: Sequence[Case],
    methods: Sequence[Method],
    x: Callable[[Case], float],
    value: Callable[[Method], Spread],
    shown: Callable[[Spread], str],
    label: Callable[[str], str] = str,
) -> None:
    """Bands, lines and marks of methods; `label` is of a method's name."""
    for method in methods:
        at = sorted((case for case in cases if method.name in case.methods), key=x)
        xs, found = [x(case) for case in at], [value(case.methods[method.name]) for case in at]
        ys, tint, plain = [one.median for one in found], _colour(method), method.role == "baseline"
        if not plain:
            quartiles = [one.q1 for one in found], [one.q3 for one in found]
            axes.fill_between(xs, *quartiles, color=tint, alpha=0.14, linewidth=0)
        width = 1.2 if plain else 3 if _weight(method) == "bold" else 2
        above = 2 if plain else 3  # ours over the baselines
        axes.plot(xs, ys, color=tint, linewidth=width, zorder=above, label=label(method.name))
        if len(xs) == 1 or not plain:
            for case, spread, *point in zip(at, found, xs, ys, strict=True):
                _dot(axes, point, method, _tip(method, case, shown(spread)), markersize=7)


def _dot(axes: Axes, at: Sequence[float], method: Method, tip: str, **look: Any) -> Line2D:
    (mark,) = axes.plot(
        *at, _mark(method), color=_colour(method), markeredgecolor=PAPER, gid=tip, zorder=4, **look
    )
    return mark


def _tip(method: Method, case: Case, shown: str) -> str:
    return f"tip:{method.name}, {case.shape}, r = {text.ratio(case.ratio)}: {shown}"


def _name_ends(axes: Axes) -> None:
    """Write the label of every line right of where it ends, apart from its neighbours."""
    lines = [one for one in axes.lines if not str(one.get_label()).startswith("_")]
    names = [str(line.get_label()) for line in lines]
    box, right = axes.get_position(), max(map(len, names)) * _CHARACTER + 20
    axes.set_position((box.x0, box.y0, 1 - box.x0 - right / _WIDTH, box.height))
    axes.margins(0.03)
    axes.autoscale_view()
    to_share = axes.transData + axes.transAxes.inverted()
    ends = [np.asarray(line.get_xydata())[-1] for line in lines]
    gap = 16 / (box.height * axes.figure.bbox.height)
    places = apart([float(to_share.transform(end)[1]) for end in ends], gap)
    for line, name, end, place in zip(lines, names, ends, places, strict=True):
        axes.annotate(
            name, tuple(end), (1.05, place), textcoords="axes fraction", va="center",
            color=line.get_color(), weight="bold" if line.get_linewidth() > 2 else "normal",
            arrowprops={"arrowstyle": "-", "color": RULE, "shrinkA": 1, "shrinkB": 5},
            annotation_clip=False,
        )  # fmt: skip


def apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Places within [0, 1], at least `gap` apart, with the least squares of shifts from `wanted`.

    A gap that leaves no room for all is made smaller. Without their gaps, places are numbers that
    do not fall, so least squares is isotonic regression.
    """
    gap = min(gap, 1 / max(1, len(wanted) - 1))
    order = np.argsort(wanted, kind="stable")
    gaps = gap * np.arange(len(wanted))
    shifted = isotonic_regression(np.asarray(wanted)[order] - gaps).x
    places = np.empty(len(wanted))
    places[order] = np.clip(shifted, 0, 1 - gaps[-1]) + gaps
    return [float(place) for place in places]


@styled
def by_ratio(cases: Sequence[Case]) -> Figure:
    """Speed-up against K/M for one shape, beside the 1/r that no overhead at all would give."""
    figure, axes = _axes(320)
    _speedups(axes, cases, lambda case: 1 / case.ratio)
    inverses = [1 / case.ratio for case in cases]
    ends = min(inverses), max(inverses)
    axes.plot(ends, ends, color=SOFT, linewidth=1.2, dashes=(4, 3), label="ideal 1/r")
    _logarithmic(axes, "x", "rows computed, K/M", tick=_ratio_tick)
    _name_ends(axes)
    return figure


@styled
def by_width(cases: Sequence[Case]) -> Figure:
    """Speed-up against N for one M and ratio."""
    figure, axes = _axes(320)
    _speedups(axes, cases, lambda case: case.n)
    _logarithmic(axes, "x", "width N")
    _name_ends(axes)
    return figure


@styled
def by_rows(cases: Sequence[Case], fits: Mapping[str, Power | None]) -> Figure:
    """Milliseconds against M; the names carry the fitted exponents."""

    def label(name: str) -> str:
        fit = fits.get(name)
        return name if fit is None else f"{name} {fit.exponent:.2f}"

    figure, axes = _axes(320)
    methods = methods_of(cases, ("dense", "ours", "baseline"))
    _curves(axes, cases, methods, lambda case: case.m, lambda one: one.ms, _milliseconds, label)
    _logarithmic(axes, "x", "rows M")
    _logarithmic(axes, "y", "time of a call, ms", base=10)
    _name_ends(axes)
    return figure


def _speedups(axes: Axes, cases: Sequence[Case], x: Callable[[Case], float]) -> None:
    _curves(axes, cases, methods_of(cases), x, lambda one: one.speedup, _with_quartiles)
    axes.axhline(1, color=SOFT, linewidth=1)
    _logarithmic(axes, "y", "speed-up over dense, ×", tick=_speed_tick)


def _with_quartiles(speed: Spread) -> str:
    return f"{text.times(speed.median)} ({text.span(speed.q1, speed.q3)})"


def _milliseconds(time: Spread) -> str:
    return text.duration(time.median)


def _speed_tick(value: float) -> str:
    return f"{value:g}×" if value >= 1 else f"1/{1 / value:g}×"


def _ratio_tick(value: float) -> str:
    return f"1/{value:g}" if value > 1 else f"{value:g}"


@styled
def roofline(cases: Sequence[Case], machine: Machine) -> Figure:
    """Roofs as lines, and the calls of dense and ours as marks: cases of one dtype."""
    dtype = cases[0].dtype
    rate = machine.gemm_gflops[dtype]
    calls = [
        (case, method, cost, cost.flops / method.ms.median / 1e6)
        for case in cases
        for method in methods_of([case], ("dense", "ours"))
        if (cost := traffic(case, method)) is not None
    ]
    figure, axes = _axes(380, right=8, top=52)
    _logarithmic(axes, "x", "useful FLOPs per byte moved")
    speeds = [rate, *(gflops for *_, gflops in calls)]
    base = 2 if max(speeds) < 64 * min(speeds) else 10
    _logarithmic(axes, "y", "useful GFLOP/s", base=base)
    bandwidths = {"read": machine.stream_gbs, "update": machine.triad_gbs}
    fastest = max(bandwidths.values())
    intensities = [rate / fastest, *(cost.intensity for _, _, cost, _ in calls)]
    low, high = min(intensities) / 2, max(intensities) * 2
    for name, bandwidth in bandwidths.items():
        xs, ys = (low, rate / bandwidth, high), (low * bandwidth, rate, rate)
        what = f"{name} {text.rate(bandwidth, 'B')}"
        width, style = (2, "-") if name == "read" else (1, ":")
        axes.plot(xs, ys, style, color=INK, linewidth=width, label=what)
    axes.add_artist(axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2))
    axes.annotate(
        f"GEMM {text.rate(rate, 'FLOP')}", (rate / fastest, rate), (2, 10),
        textcoords="offset points", va="center",
    )  # fmt: skip
    marks: dict[str, Line2D] = {}
    for case, method, cost, gflops in sorted(
        calls, key=lambda call: (call[1].role != "dense", rank(call[1]))
    ):
        share = text.percent(gflops / cost.roof(machine, dtype))
        tip = _tip(method, case, f"{text.rate(gflops, 'FLOP')}, {share} of the roof")
        mark = _dot(axes, (cost.intensity, gflops), method, tip, markersize=8, alpha=0.75)
        marks.setdefault(method.name, mark)
    axes.legend(
        marks.values(), marks, loc="lower right", labelcolor="markerfacecolor", handletextpad=0
    )
    axes.margins(x=0, y=0.15)
    return figure


@styled
def bars(cases: Sequence[Case]) -> Figure:
    """Speed-ups, a group of bars per case; whiskers are the quartiles, a tick the target."""
    lines = [(case, method) for case in cases for method in methods_of([case])]
    height = len(lines) + 1.6 * len(cases)
    longest = max((len(method.name) for _, method in lines), default=0)
    left = min(longest * _CHARACTER + 10, 0.42 * _WIDTH)
    figure, axes = _axes(22 * height + 48, left=left, right=50, top=2)
    ys = [line + 1.6 * cases.index(case) + 1.3 for line, (case, _) in enumerate(lines)]
    for case in cases:
        first = next((y for y, (one, _) in zip(ys, lines, strict=True) if one is case), 1.3)
        at = 0, first - 0.7
        axes.annotate(case.title, at, xycoords=("figure fraction", "data"), weight="bold")
    for y, (case, method) in zip(ys, lines, strict=True):
        speed, wanted = method.speedup, case.wanted.get(method.name)
        shown = f"tip:{method.name}: {_with_quartiles(speed)}"
        axes.barh(y, speed.median, 0.64, color=_colour(method), alpha=0.85, gid=shown, zorder=2)
        whiskers = [[speed.median - speed.q1], [speed.q3 - speed.median]]
        axes.errorbar(speed.median, y, xerr=whiskers, ecolor=INK, elinewidth=1.3, capsize=4)
        if wanted is not None:
            axes.vlines(wanted, y - 0.45, y + 0.45, color=colour("bad"), linewidth=2.5, zorder=4)
        end, value = max(speed.q3, wanted or 0.0), text.times(speed.median)
        axes.annotate(value, (end, y), (8, 0), textcoords="offset points", va="center")
    axes.set_yticks(ys, [method.name for _, method in lines])
    for name, (_, method) in zip(axes.get_yticklabels(), lines, strict=True):
        name.set(color=_colour(method), weight=_weight(method))
    axes.axvline(1, color=SOFT, linewidth=1)
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlim=(0, None), ylim=(height, 0), xlabel="speed-up over dense, ×")
    return figure


@styled
def grid(found: Sequence[Field]) -> Figure:
    """The break-even map: N = P to the right, M upwards; measured cells have a frame."""
    columns = sorted({one.width for one in found})
    lines = sorted({one.m for one in found})
    right = 2 + 50 * max(0, 6 - len(columns))  # cells of one width, even if there are few
    figure, axes = _axes(27 * len(lines) + 68, right=right, top=24, width=350)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(-0.5, len(lines) - 0.5))
    axes.set_xticks(range(len(columns)), map(text.axis, columns))
    axes.set_yticks(range(len(lines)), map(text.axis, lines))
    axes.set_xlabel("width N = P")
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    figure.text(0, 1, "rows M", color=SOFT, va="top")
    for one in found:
        if math.isnan(one.speedup):
            continue
        x, y = columns.index(one.width), lines.index(one.m)
        how = "measured" if one.measured else "interpolated"
        axes.add_patch(FancyBboxPatch(
            (x - 0.46, y - 0.45), 0.92, 0.9, "round,pad=0,rounding_size=0.06",
            facecolor=colour(f"g{bisect(_CLASSES, one.speedup)}"),
            edgecolor=INK if one.measured else "none", linewidth=1.6,
            zorder=3 if one.measured else 2,
            gid=f"tip:M = {one.m}, N = P = {one.width}: {one.speedup:.2f}×, {how}",
        ))  # fmt: skip
        shown = f"{one.speedup:.1f}" if one.speedup < 9.95 else f"{one.speedup:.0f}"
        axes.text(
            x, y, shown, color=colour("on-cell"), ha="center",
            va="center_baseline", weight="bold" if one.measured else "normal", zorder=4,
        )  # fmt: skip
    return figure
