"""Bars of speed-ups with the quartiles as whiskers and what was wanted as a tick."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from memaop_triton.bench.report import text
from memaop_triton.bench.report.data import Case, Method
from memaop_triton.bench.report.methods import ordered, series
from memaop_triton.bench.report.plot import NARROW
from memaop_triton.bench.report.svg import CHARACTER, Drawing, Scale, clipped, steps

_BAR, _GAP, _TITLE = 22.0, 12.0, 22.0


def bars(cases: Sequence[Case], label: str) -> Callable[[float], Drawing]:
    """One group of bars per case, one bar per method of ours and per baseline."""
    groups = [(case, ordered(case.of_role("ours") + case.of_role("baseline"))) for case in cases]

    def draw(width: float) -> Drawing:
        count = sum(len(methods) for _, methods in groups)
        top = 8.0
        height = top + count * _BAR + len(groups) * (_TITLE + _GAP) + 40
        drawing = Drawing(width, height, label)
        longest = max((len(m.name) for _, methods in groups for m in methods), default=0)
        left = min(longest * 1.1 * CHARACTER + 14, width * 0.42)
        highest = max(
            [1.0]
            + [m.speedup.q3 for _, methods in groups for m in methods]
            + [wanted for case, _ in groups for wanted in case.wanted.values()]
        )
        x = Scale(0, highest * 1.02, left, width - 58, log=False)
        bottom = height - 38
        for value in steps(x.high, 4 if width < NARROW else 8):
            drawing.line((x(value), top), (x(value), bottom), "grid")
            drawing.text((x(value), bottom + 16), f"{value:g}", "tick", "middle")
        drawing.line((x(1), top), (x(1), bottom), "one")
        middle = (x.start + x.end) / 2
        drawing.text((middle, height - 5), "speed-up over dense, ×", "title", "middle")
        y = top
        for case, methods in groups:
            drawing.text((0, y + 15), clipped(case.title, width), "group")
            y += _TITLE
            for method in methods:
                _bar(drawing, x, y, method, case.wanted.get(method.name), left)
                y += _BAR
            y += _GAP
        return drawing

    return draw


def _bar(
    drawing: Drawing, x: Scale, y: float, method: Method, wanted: float | None, left: float
) -> None:
    speed, css = method.speedup, series(method)
    middle = y + _BAR / 2
    drawing.text((left - 8, middle + 4), clipped(method.name, left - 8), f"name {css}", "end")
    tip = f"{method.name}: {text.times(speed.median)} ({text.span(speed.q1, speed.q3)})"
    size = x(speed.median) - x.start
    drawing.rectangle((x.start, y + 4), size, _BAR - 8, f"bar {css}", tip, 1)
    drawing.line((x(speed.q1), middle), (x(speed.q3), middle), "whisker")
    for end in (speed.q1, speed.q3):
        drawing.line((x(end), middle - 4), (x(end), middle + 4), "whisker")
    if wanted is not None:
        drawing.line((x(wanted), y + 1), (x(wanted), y + _BAR - 1), "wanted")
    after = max(x(speed.q3), x(wanted or 0.0)) + 8
    drawing.text((after, middle + 4), text.times(speed.median), "value")
