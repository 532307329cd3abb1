"""SVG by hand: scales, a drawing, and axes. Colours are left to the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]
# Average width of a character of the charts' 12-pixel text, in pixels.
CHARACTER = 6.4


@dataclass(frozen=True)
class Scale:
    """From data to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = True

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def holds(self, value: float) -> bool:
        """Whether a value lies on the axis."""
        return self.low <= value <= self.high


def powers(low: float, high: float, base: float, most: int) -> list[float]:
    """Powers of `base` in [low, high], thinned evenly to about `most`; 1 is kept."""
    first = math.ceil(math.log(low, base) - 1e-9)
    last = math.floor(math.log(high, base) + 1e-9)
    step = max(1, math.ceil((last - first + 1) / most))
    return [base**i for i in range(first, last + 1) if i % step == 0]


def steps(high: float, most: int) -> list[float]:
    """0 and multiples of 1, 2 or 5 times a power of ten up to `high`, at most `most`."""
    rough = high / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * one for one in (1, 2, 5, 10) if unit * one >= rough)
    return [i * step for i in range(int(high / step + 1e-9) + 1)]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near to `wanted` as possible, at least `gap` apart, in [low, high].

    Neighbours that are too close move apart around their mean. If they do not all fit, the gap
    shrinks.
    """
    if not wanted:
        return []
    gap = min(gap, (high - low) / len(wanted))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[list[float]] = []  # each a list of wanted positions
    for i in order:
        groups.append([wanted[i]])
        while len(groups) > 1 and _end(groups[-2], gap, low, high) > _start(
            groups[-1], gap, low, high
        ):
            last = groups.pop()
            groups[-1] += last
    placed = [
        _start(group, gap, low, high) + (i + 0.5) * gap
        for group in groups
        for i in range(len(group))
    ]
    result = [0.0] * len(wanted)
    for i, position in zip(order, placed, strict=True):
        result[i] = position
    return result


def _start(group: list[float], gap: float, low: float, high: float) -> float:
    height = len(group) * gap
    return min(max(sum(group) / len(group) - height / 2, low), high - height)


def _end(group: list[float], gap: float, low: float, high: float) -> float:
    return _start(group, gap, low, high) + len(group) * gap - 1e-9


def clipped(label: str, width: float) -> str:
    """A label cut to a width in pixels."""
    most = max(1, int(width / CHARACTER))
    return label if len(label) <= most else label[: most - 1] + "…"


class Drawing:
    """An SVG that grows by elements; `str` gives it. All text is escaped."""

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width = width
        self.height = height
        self._parts = [
            f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
            f'role="img" aria-label="{escape(label)}"><title>{escape(label)}</title>'
        ]

    def __str__(self) -> str:
        return "".join(self._parts) + "</svg>"

    def line(self, start: Point, end: Point, css: str) -> None:
        """A straight line."""
        (x1, y1), (x2, y2) = start, end
        self._parts.append(
            f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
        )

    def path(self, points: Sequence[Point], css: str, *, closed: bool = False) -> None:
        """A line through points, or the area within."""
        joined = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self._parts.append(f'<path class="{css}" d="M{joined}{"Z" if closed else ""}"/>')

    def rectangle(
        self, corner: Point, width: float, height: float, css: str, tip: str = "", radius: float = 0
    ) -> None:
        """A rectangle from its upper left corner."""
        x, y = corner
        self._parts.append(
            f'<rect class="{css}" x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" '
            f'height="{height:.1f}" rx="{radius:g}">{_tip(tip)}</rect>'
        )

    def mark(self, at: Point, shape: str, css: str, tip: str = "", radius: float = 4) -> None:
        """A `circle`, `square`, `diamond`, `up` or `down` of equal weight, with a tooltip."""
        x, y = at
        if shape == "circle":
            body = f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"'
        else:
            corners = " ".join(
                f"{x + radius * dx:.1f},{y + radius * dy:.1f}" for dx, dy in _MARKS[shape]
            )
            body = f'<polygon class="{css}" points="{corners}"'
        self._parts.append(f"{body}>{_tip(tip)}</{body[1 : body.index(' ')]}>")

    def text(self, at: Point, content: str, css: str = "", anchor: str = "start") -> None:
        """Text on a baseline."""
        x, y = at
        self._parts.append(
            f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
            f"{escape(content)}</text>"
        )


_MARKS = {
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "diamond": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
    "up": ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
    "down": ((0, 1.2), (1.15, -0.9), (-1.15, -0.9)),
}


def _tip(tip: str) -> str:
    return f"<title>{escape(tip)}</title>" if tip else ""
