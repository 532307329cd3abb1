"""What a report is made of, before it becomes HTML or Markdown.

Text may hold `code` in backticks and nothing else; whatever writes it out escapes the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from memaop_triton.bench.report.svg import Drawing


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: Its value.
        sub: Small, below the value.
        tone: `best`, `bad` or nothing.
    """

    text: str
    sub: str = ""
    tone: str = ""


NOTHING = Cell("–")


@dataclass(frozen=True)
class Table:
    """A table whose first columns are its rows' names.

    Attributes:
        head: Names of the columns.
        rows: As many cells as there are columns, each.
        names: How many columns are names; numbers follow.
        prose: Whether the last of the names is a sentence.
        caption: What its cells are.
        groups: (name, columns) above the head; none if empty.
        folded: What to click on to see it; shown at once if empty.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    names: int = 1
    prose: bool = False
    caption: str = ""
    groups: tuple[tuple[str, int], ...] = ()
    folded: str = ""


@dataclass(frozen=True)
class Chart:
    """A picture that draws itself for a width in pixels; Markdown leaves it out.

    Attributes:
        title: Above it.
        draw: From a width to an SVG.
        share: Of a page's width on a desktop: 1, or one of 2 or 3 side by side.
    """

    title: str
    draw: Callable[[float], Drawing]
    share: int = 2


@dataclass(frozen=True)
class Picture:
    """A picture that was drawn before, as wide as the page.

    Attributes:
        title: Above it.
        svg: The picture.
        file: Its name beside the report, for Markdown.
    """

    title: str
    svg: str
    file: str


@dataclass(frozen=True)
class Bullets:
    """A list; what is beyond `shown` is folded away."""

    items: tuple[str, ...]
    shown: int = 5


@dataclass(frozen=True)
class Code:
    """Commands to type."""

    text: str


@dataclass(frozen=True)
class Subheading:
    """A heading inside a section."""

    text: str


Block = str | Subheading | Table | Chart | Picture | Bullets | Code


@dataclass(frozen=True)
class Section:
    """A heading and what is under it; `key` is the anchor."""

    key: str
    title: str
    blocks: list[Block] = field(default_factory=list)
