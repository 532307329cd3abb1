"""Lines over two axes, each labelled where it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memaop_triton.bench.report import text
from memaop_triton.bench.report.svg import CHARACTER, Drawing, Point, Scale, clipped, powers, spread

NARROW = 480  # a chart less wide is for a phone


@dataclass(frozen=True)
class Sample:
    """A point of a line, with the range of its quartiles and a tooltip."""

    x: float
    y: float
    low: float
    high: float
    tip: str


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: Written at its end.
        css: The class that colours it.
        samples: In order of x.
        shape: Of its marks; none along a line if empty.
        band: Whether the quartiles are shaded.
    """

    name: str
    css: str
    samples: Sequence[Sample]
    shape: str = "circle"
    band: bool = True


@dataclass(frozen=True)
class Axis:
    """What an axis shows.

    Attributes:
        label: With its unit.
        low: Its least value.
        high: Its largest value.
        base: Ticks are powers of it.
        tick: How a tick is written.
    """

    label: str
    low: float
    high: float
    base: float = 2
    tick: Callable[[float], str] = text.axis


class Plot:
    """A drawing with two logarithmic axes and room for labels on the right."""

    def __init__(
        self,
        width: float,
        height: float,
        label: str,
        x: Axis,
        y: Axis,
        names: Sequence[str],
        top: float = 30,
    ) -> None:
        narrow = width < NARROW
        longest = max((len(name) for name in names), default=0)
        right = min(longest * CHARACTER + 22, width * 0.3)
        self.drawing = Drawing(width, height, label)
        self.x = Scale(x.low, x.high, 50, width - right)
        self.y = Scale(y.low, y.high, height - 46, top)
        self._room = right - 18
        for value in powers(y.low, y.high, y.base, 7):
            at = self.y(value)
            self.drawing.line((self.x.start, at), (self.x.end, at), "grid")
            self.drawing.text((self.x.start - 7, at + 4), y.tick(value), "tick", "end")
        for value in powers(x.low, x.high, x.base, 5 if narrow else 9):
            at = self.x(value)
            self.drawing.line((at, self.y.start), (at, self.y.start + 4), "axis")
            self.drawing.text((at, self.y.start + 18), x.tick(value), "tick", "middle")
        self.drawing.line((self.x.start, self.y.start), (self.x.end, self.y.start), "axis")
        self.drawing.text((0, 13), y.label, "title")
        self.drawing.text(((self.x.start + self.x.end) / 2, height - 8), x.label, "title", "middle")

    def at(self, x: float, y: float) -> Point:
        """The pixel of a point."""
        return self.x(x), self.y(y)

    def add(self, series: Series) -> None:
        """Band, line and marks of a series."""
        drawing, samples = self.drawing, series.samples
        if series.band and len(samples) > 1:
            upper = [self.at(one.x, one.high) for one in samples]
            lower = [self.at(one.x, one.low) for one in reversed(samples)]
            drawing.path(upper + lower, f"band {series.css}", closed=True)
        if len(samples) > 1:
            drawing.path([self.at(one.x, one.y) for one in samples], f"line {series.css}")
        shape = series.shape or ("circle" if len(samples) == 1 else "")
        if shape:
            for one in samples:
                drawing.mark(self.at(one.x, one.y), shape, f"dot {series.css}", one.tip, 3.2)

    def label_ends(self, every: Sequence[Series]) -> None:
        """The name of every series right of where it ends, moved apart where they are close."""
        ends = [self.at(one.samples[-1].x, one.samples[-1].y) for one in every]
        places = spread([y for _, y in ends], 14, self.y.end - 8, self.y.start + 8)
        left = self.x.end + 14
        for one, (x, y), place in zip(every, ends, places, strict=True):
            self.drawing.path([(x + 4, y), (left - 8, place), (left - 3, place)], "leader")
            name = clipped(one.name, self._room)
            self.drawing.text((left, place + 4), name, f"name {one.css}")
