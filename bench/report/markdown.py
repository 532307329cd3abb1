"""A report as Markdown for GitHub: the same text and tables, without the pictures."""

from __future__ import annotations

import re

from memaop_triton.bench.report.analysis import Figure
from memaop_triton.bench.report.blocks import (
    Block,
    Bullets,
    Cell,
    Chart,
    Code,
    Picture,
    Subheading,
    Table,
)
from memaop_triton.bench.report.document import Document


def markdown(document: Document, page: str) -> str:
    """The whole file; `page` is the name of the HTML file, which has the pictures."""
    parts = [
        f"# {plain(document.title)}",
        plain(document.summary),
        "\n".join(f"- **{plain(f.value)}** {_figure(f)}" for f in document.figures),
        plain(document.missing),
        "\n".join(["| | |", "|---|---|", *map(_fact, document.facts)]),
        f"The page beside this file, [{page}]({page}), has the pictures: "
        f"{plain(document.pictures)}.",
    ]
    for section in document.sections:
        parts.append(f"## {plain(section.title)}")
        parts += map(_block, section.blocks)
    return "\n\n".join(filter(None, parts)) + "\n"


def _figure(figure: Figure) -> str:
    return f"{plain(figure.what)} ({plain(figure.detail)})"


def _fact(fact: tuple[str, str]) -> str:
    return f"| {plain(fact[0])} | {plain(fact[1])} |"


def plain(content: str) -> str:
    """Text on one line that GitHub takes as text: no HTML, no links, no columns, but `code`."""
    content = " ".join(content.split()).replace("&", "&amp;")
    content = content.replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([|\[\]*\\])", r"\\\1", content)


def _block(block: Block) -> str:
    match block:
        case str():
            return plain(block)
        case Subheading():
            return f"### {plain(block.text)}"
        case Table():
            return _table(block)
        case Bullets():
            return _bullets(block)
        case Code():
            return f"```\n{block.text}\n```"
        case Chart():
            return ""
        case Picture():
            return f"![{plain(block.title)}]({block.file})"


def _bullets(bullets: Bullets) -> str:
    lines = [f"- {plain(item)}" for item in bullets.items]
    shown, rest = lines[: bullets.shown], lines[bullets.shown :]
    if not rest:
        return "\n".join(shown)
    folded = f"<details><summary>{len(rest)} more</summary>\n\n" + "\n".join(rest)
    return "\n".join(shown) + f"\n\n{folded}\n\n</details>"


def _table(table: Table) -> str:
    count = len(table.head)
    rule = ["---" if i < table.names else "---:" for i in range(count)]
    lines = [[plain(name) for name in table.head], rule]
    lines += [[_cell(cell) for cell in row] for row in table.rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    if table.folded:
        summary = plain(table.folded)
        body = f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>"
    return f"{plain(table.caption)}\n\n{body}" if table.caption else body


def _cell(cell: Cell) -> str:
    content = f"**{plain(cell.text)}**" if cell.tone == "best" else plain(cell.text)
    return f"{content} ({plain(cell.sub)})" if cell.sub else content
