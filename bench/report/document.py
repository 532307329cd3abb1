"""What a report is made of, before it is written as HTML and as Markdown.

Text may hold `code` in backticks and nothing else; whatever writes it out escapes the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from matplotlib.figure import Figure


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

    kind: ClassVar = "table"
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    names: int = 1
    prose: bool = False
    caption: str = ""
    groups: tuple[tuple[str, int], ...] = ()
    folded: str = ""


@dataclass(frozen=True)
class Chart:
    """A picture.

    Attributes:
        title: Above it.
        figure: As `charts` and `figures` make it.
        columns: How many charts of its kind lie side by side on a desktop: 1, 2 or 3.
        file: Its name beside the report, for Markdown, which leaves out pictures without a file.
    """

    kind: ClassVar = "chart"
    title: str
    figure: Figure
    columns: int = 2
    file: str = ""


@dataclass(frozen=True)
class Bullets:
    """A list; what is beyond `shown` is folded away."""

    kind: ClassVar = "bullets"
    items: tuple[str, ...]
    shown: int = 5


@dataclass(frozen=True)
class Code:
    """Commands to type."""

    kind: ClassVar = "code"
    text: str


@dataclass(frozen=True)
class Subheading:
    """A heading inside a section."""

    kind: ClassVar = "subheading"
    text: str


Block = str | Subheading | Table | Chart | Bullets | Code


@dataclass(frozen=True)
class Section:
    """A heading and what is under it; `key` is the anchor."""

    key: str
    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Headline:
    """One number above all others, what it is, and of which calls."""

    value: str
    what: str
    detail: str


@dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        kind: What is written above the title.
        title: Its heading.
        summary: What was measured, in a sentence or two.
        facts: (name, value) of machine, versions and date.
        missing: What there are no numbers for; may be empty.
        sections: In order.
        headlines: The numbers above all others.
        pictures: What only the page has, for Markdown.
    """

    kind: str
    title: str
    summary: str
    facts: tuple[tuple[str, str], ...]
    missing: str
    sections: tuple[Section, ...]
    headlines: tuple[Headline, ...] = ()
    pictures: str = "roofline, curves, maps"
