"""The charts of the report: speed-ups, times, the roofline, bars and the break-even map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from memaop_triton.bench.report import text
from memaop_triton.bench.report.breakeven import Field, grade
from memaop_triton.bench.report.data import Case, Machine, Method, Spread
from memaop_triton.bench.report.figures import INK, PAPER, RULE, SOFT, colour, new_figure, styled
from memaop_triton.bench.report.fits import Power
from memaop_triton.bench.report.methods import base_name, methods_of, ordered
from memaop_triton.bench.report.roofline import Call

# A chart is as wide as a phone, nearly: a desktop shows two or three side by side.
_WIDTH = 390.0
_CHARACTER = 6.8  # average width of one of the charts' text
# Marks too, so that colour is not all that tells methods apart.
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
    right: float,
    *,
    left: float = 42,
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
    limits: tuple[float, float],
    *,
    base: float = 2,
    tick: Callable[[float], str] = text.axis,
) -> None:
    """Scale one axis, `x` or `y`; the label of `y` stands above it, where it reads easily."""
    axis = getattr(axes, f"{side}axis")
    getattr(axes, f"set_{side}scale")("log", base=base)
    getattr(axes, f"set_{side}lim")(*limits)
    axis.set_major_locator(LogLocator(base=base, numticks=9))
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
    tip: Callable[[Case, Method], str],
) -> list[tuple[float, float]]:
    """Bands, lines and marks; where each line ends."""
    ends = []
    for method in methods:
        at = sorted((case for case in cases if method.name in case.methods), key=x)
        xs, found = [x(case) for case in at], [case.methods[method.name] for case in at]
        spreads, how = [value(one) for one in found], _colour(method)
        ys, plain = [one.median for one in spreads], method.role == "baseline"
        above = 2 if plain else 3  # ours over the baselines
        if not plain:
            quartiles = [one.q1 for one in spreads], [one.q3 for one in spreads]
            axes.fill_between(xs, *quartiles, color=how, alpha=0.14, linewidth=0)
        width = 1.2 if plain else 3 if _weight(method) == "bold" else 2
        axes.plot(xs, ys, color=how, linewidth=width, zorder=above)
        if len(xs) == 1 or not plain:
            for case, one, *point in zip(at, found, xs, ys, strict=True):
                _dot(axes, point, method, tip(case, one), markersize=7)
        ends.append((xs[-1], ys[-1]))
    return ends


def _dot(axes: Axes, at: Sequence[float], method: Method, tip: str, **look: Any) -> None:
    x, y = at
    axes.plot(
        [x], [y], _mark(method), color=_colour(method), markeredgecolor=PAPER, markeredgewidth=1,
        gid=f"tip:{tip}", zorder=4, **look,
    )  # fmt: skip


def _name_ends(
    axes: Axes, ends: Sequence[tuple[float, float]], names: Sequence[str], looks: Sequence[Any]
) -> None:
    """The name of every line right of where it ends, apart from its neighbours."""
    to_share = axes.transData + axes.transAxes.inverted()
    heights = [float(to_share.transform(end)[1]) for end in ends]
    gap = 16 / (axes.get_position().height * axes.figure.bbox.height)
    for end, place, name, look in zip(ends, apart(heights, gap), names, looks, strict=True):
        axes.annotate(
            name,
            end,
            (1.05, place),
            textcoords="axes fraction",
            va="center",
            arrowprops={"arrowstyle": "-", "color": RULE, "shrinkA": 1, "shrinkB": 5},
            annotation_clip=False,
            **look,
        )


def apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Places within [0, 1], at least `gap` apart, with the least squares of shifts from `wanted`.

    A gap that leaves no room for all is made smaller. Least squares in a given order are means of
    neighbours that would collide, which is isotonic regression (max-min formula).
    """
    count = len(wanted)
    gap = min(gap, 1 / max(1, count - 1))
    order = sorted(range(count), key=lambda i: wanted[i])
    shifted = [wanted[i] - gap * place for place, i in enumerate(order)]
    places = [0.0] * count
    for place, i in enumerate(order):
        best = max(
            min(fmean(shifted[low : high + 1]) for high in range(place, count))
            for low in range(place + 1)
        )
        places[i] = min(max(best, 0.0), 1 - gap * (count - 1)) + gap * place
    return places


def _look(method: Method) -> dict[str, Any]:
    return {"color": _colour(method), "weight": _weight(method)}


def _room(names: Sequence[str]) -> float:
    return max(map(len, names)) * _CHARACTER + 20


@styled
def by_ratio(cases: Sequence[Case]) -> Figure:
    """Speed-up against K/M for one shape, beside the 1/r that no overhead at all would give."""
    methods = methods_of(cases)
    names = [*(one.name for one in methods), "ideal 1/r"]
    figure, axes = _axes(320, _room(names))
    inverses = [1 / case.ratio for case in cases]
    least, most = min(inverses), max(inverses)
    _logarithmic(axes, "x", "rows computed, K/M", (least * 0.93, most * 1.07), tick=_ratio_tick)
    _speed_axis(axes, cases, methods, most)
    ends = _curves(axes, cases, methods, lambda case: 1 / case.ratio, _speed, _speed_tip)
    axes.plot([least, most], [least, most], color=SOFT, linewidth=1.2, dashes=(4, 3))
    looks = [*map(_look, methods), {"color": SOFT}]
    _name_ends(axes, [*ends, (most, most)], names, looks)
    return figure


@styled
def by_width(cases: Sequence[Case]) -> Figure:
    """Speed-up against N for one M and ratio."""
    methods = methods_of(cases)
    names = [one.name for one in methods]
    figure, axes = _axes(320, _room(names))
    sizes = [case.n for case in cases]
    _logarithmic(axes, "x", "width N", (min(sizes) * 0.9, max(sizes) * 1.1))
    _speed_axis(axes, cases, methods)
    ends = _curves(axes, cases, methods, lambda case: case.n, _speed, _speed_tip)
    _name_ends(axes, ends, names, [*map(_look, methods)])
    return figure


@styled
def by_rows(cases: Sequence[Case], fits: Mapping[str, Power | None]) -> Figure:
    """Milliseconds against M; the names carry the fitted exponents."""
    methods = methods_of(cases, ("dense", "ours", "baseline"))
    names = [
        one.name if (fit := fits.get(one.name)) is None else f"{one.name} {fit.exponent:.2f}"
        for one in methods
    ]
    figure, axes = _axes(320, _room(names))
    sizes = [case.m for case in cases]
    times = [case.methods[one.name].ms for one in methods for case in cases
             if one.name in case.methods]  # fmt: skip
    limits = min(one.q1 for one in times) * 0.8, max(one.q3 for one in times) * 1.25
    _logarithmic(axes, "x", "rows M", (min(sizes) * 0.9, max(sizes) * 1.1))
    _logarithmic(axes, "y", "time of a call, ms", limits, base=10)
    ends = _curves(axes, cases, methods, lambda case: case.m, lambda one: one.ms, _time_tip)
    _name_ends(axes, ends, names, [*map(_look, methods)])
    return figure


def _speed_axis(
    axes: Axes, cases: Sequence[Case], methods: Sequence[Method], highest: float = 2
) -> None:
    found = [case.methods[one.name].speedup for one in methods for case in cases
             if one.name in case.methods]  # fmt: skip
    low, high = min(one.q1 for one in found), max(one.q3 for one in found)
    limits = min(1.0, low) * 0.9, max(highest, high, 2) * 1.08
    _logarithmic(axes, "y", "speed-up over dense, ×", limits, tick=_speed_tick)
    axes.axhline(1, color=SOFT, linewidth=1)


def _speed(method: Method) -> Spread:
    return method.speedup


def _speed_tick(value: float) -> str:
    return f"{value:g}×" if value >= 1 else f"1/{1 / value:g}×"


def _ratio_tick(value: float) -> str:
    return f"1/{value:g}" if value > 1 else f"{value:g}"


def _speed_tip(case: Case, method: Method) -> str:
    speed = method.speedup
    quartiles = text.span(speed.q1, speed.q3)
    where = f"{case.shape}, r = {text.ratio(case.ratio)}"
    return f"{method.name}, {where}: {text.times(speed.median)} ({quartiles})"


def _time_tip(case: Case, method: Method) -> str:
    return f"{method.name}, {case.shape}: {text.duration(method.ms.median)}"


@styled
def roofline(found: Sequence[Call], machine: Machine, dtype: str) -> Figure:
    """Roofs as lines and calls as marks, all of one dtype, whose rate the machine must have."""
    rate = machine.gemm_gflops[dtype]
    bandwidths = {
        name: bandwidth
        for name, bandwidth in (("read", machine.stream_gbs), ("update", machine.triad_gbs))
        if bandwidth is not None
    }
    fastest = max(bandwidths.values())
    intensities = [rate / fastest, *(call.intensity for call in found)]
    low, high = min(intensities) / 2, max(intensities) * 2
    slowest = min(low * fastest, *(call.gflops for call in found))
    top = max(rate, *(call.gflops for call in found))
    figure, axes = _axes(380, 8, top=52)
    _logarithmic(axes, "x", "useful FLOPs per byte moved", (low, high))
    limits, base = (slowest * 0.8, top * 1.5), 2 if top < 64 * slowest else 10
    _logarithmic(axes, "y", "useful GFLOP/s", limits, base=base)
    looks: dict[str, dict[str, Any]] = {
        "read": {"linewidth": 2},
        "update": {"linewidth": 1, "dashes": (2, 2)},
    }
    roofs = []
    for name, bandwidth in bandwidths.items():
        corner, what = rate / bandwidth, f"{name} {text.rate(bandwidth, 'B')}"
        xs, ys = (low, corner, high), (low * bandwidth, rate, rate)
        roofs += axes.plot(xs, ys, color=INK, label=what, zorder=2, **looks[name])
    axes.annotate(
        f"GEMM {text.rate(rate, 'FLOP')}", (rate / fastest, rate), (2, 10),
        textcoords="offset points", va="center",
    )  # fmt: skip
    for call in found:
        at = call.intensity, call.gflops
        _dot(axes, at, call.method, _call_tip(call), markersize=8, alpha=0.75)
    named = {call.method.name: call.method for call in found}
    methods = [one for one in named.values() if one.role == "dense"]
    methods += ordered([one for one in named.values() if one.role == "ours"])
    marks = [
        Line2D([], [], linestyle="", marker=_mark(one), color=_colour(one), label=one.name)
        for one in methods
    ]
    axes.add_artist(
        axes.legend(handles=marks, loc="lower right", labelcolor="linecolor", handletextpad=0)
    )
    axes.legend(handles=roofs, loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2)
    return figure


def _call_tip(call: Call) -> str:
    where = f"{call.method.name}, {call.case.shape}, r = {text.ratio(call.case.ratio)}"
    share = text.percent(call.gflops / call.roof)
    return f"{where}: {text.rate(call.gflops, 'FLOP')}, {share} of the roof"


@styled
def bars(cases: Sequence[Case]) -> Figure:
    """Speed-ups, a group of bars per case; whiskers are the quartiles, a tick what was wanted."""
    groups = [(case, methods_of([case])) for case in cases]
    names = [one.name for _, methods in groups for one in methods]
    lines = len(names) + 1.6 * len(groups)
    figure, axes = _axes(22 * lines + 48, 50, left=min(_room(names) - 10, 0.42 * _WIDTH), top=2)
    highest = max(
        1.0,
        *(one.speedup.q3 for _, methods in groups for one in methods),
        *(wanted for case in cases for wanted in case.wanted.values()),
    )
    axes.set(xlim=(0, highest * 1.02), ylim=(lines, 0), yticks=[])
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(visible=True, axis="x")
    axes.axvline(1, color=SOFT, linewidth=1)
    axes.set_xlabel("speed-up over dense, ×")
    y = 0.0
    for case, methods in groups:
        y += 0.6
        axes.annotate(case.title, (0, y), xycoords=("figure fraction", "data"), weight="bold")
        for method in methods:
            y += 1
            _bar(axes, y - 0.3, method, case.wanted.get(method.name))
        y += 1
    return figure


def _bar(axes: Axes, y: float, method: Method, wanted: float | None) -> None:
    speed, alpha = method.speedup, 0.5 if method.role == "baseline" else 0.85
    axes.annotate(
        method.name, (0, y), (-8, 0), textcoords="offset points", ha="right", va="center",
        annotation_clip=False, **_look(method),
    )  # fmt: skip
    tip = f"tip:{method.name}: {text.times(speed.median)} ({text.span(speed.q1, speed.q3)})"
    axes.barh(y, speed.median, 0.64, color=_colour(method), alpha=alpha, gid=tip, zorder=2)
    whiskers = [[speed.median - speed.q1], [speed.q3 - speed.median]]
    axes.errorbar(
        speed.median, y, xerr=whiskers, ecolor=INK, elinewidth=1.3, capsize=4, capthick=1.3
    )
    if wanted is not None:
        axes.plot([wanted] * 2, [y - 0.45, y + 0.45], color=colour("bad"), linewidth=2.5, zorder=4)
    end = max(speed.q3, wanted or 0.0)
    axes.annotate(
        text.times(speed.median), (end, y), (8, 0), textcoords="offset points", va="center"
    )


@styled
def grid(found: Sequence[Field]) -> Figure:
    """The break-even map: N = P to the right, M upwards; measured cells have a frame."""
    columns = sorted({one.width for one in found})
    lines = sorted({one.m for one in found})
    figure, axes = _axes(27 * len(lines) + 68, 2, top=24, width=350)
    axes.set(xlim=(-0.5, max(len(columns), 6) - 0.5), ylim=(-0.5, len(lines) - 0.5))
    axes.set_xticks(range(len(columns)), map(text.axis, columns))
    axes.set_yticks(range(len(lines)), map(text.axis, lines))
    axes.set_xlabel("width N = P")
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    figure.text(0, 1, "rows M", color=SOFT, va="top")
    for one in found:
        x, y = columns.index(one.width), lines.index(one.m)
        how = "measured" if one.measured else "fitted" if one.inside else "fitted beyond"
        alpha, frame = 1 if one.measured or one.inside else 0.45, INK if one.measured else "none"
        axes.add_patch(FancyBboxPatch(
            (x - 0.46, y - 0.45), 0.92, 0.9, "round,pad=0,rounding_size=0.06",
            facecolor=colour(f"g{grade(one.speedup)}"), edgecolor=frame, linewidth=1.6,
            alpha=alpha, zorder=3 if one.measured else 2,
            gid=f"tip:M = {one.m}, N = P = {one.width}: {one.speedup:.2f}×, {how}",
        ))  # fmt: skip
        shown = f"{one.speedup:.1f}" if one.speedup < 9.95 else f"{one.speedup:.0f}"
        axes.text(
            x, y, shown, color=colour("on-cell"), alpha=max(alpha, 0.75), ha="center",
            va="center_baseline", weight="bold" if one.measured else "normal", zorder=4,
        )  # fmt: skip
    return figure
