"""A report as one HTML file: style and pictures are in it, and it asks for nothing else."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from memaop_triton.bench.report.analysis import Figure
from memaop_triton.bench.report.blocks import (
    Block,
    Bullets,
    Cell,
    Chart,
    Code,
    Picture,
    Section,
    Subheading,
    Table,
)
from memaop_triton.bench.report.document import Document
from memaop_triton.bench.report.methods import PAPER

_STYLE = Path(__file__).with_name("style.css")
# Widths a chart is drawn for, in pixels; the style sheet shows the one that fits.
WIDTHS = {"wide": 1040, "medium": 508, "narrow": 350}


def page(document: Document) -> str:
    """The whole file."""
    title = escape(document.title)
    return "".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{title}</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}</style>",
            "</head>\n<body><main>\n",
            f'<header><p class="kicker">{escape(document.kind)}</p><h1>{title}</h1>',
            f'<p class="summary">{inline(document.summary)}</p></header>\n',
            _figures(document.figures),
            f'<p class="gap">{inline(document.missing)}</p>\n' if document.missing else "",
            _facts(document.facts),
            _contents(document.sections),
            *map(_section, document.sections),
            '<footer><p>The method started as Mem-AOP-GD, <a href="'
            f'{PAPER}">arXiv 2110.09164</a>.</p></footer>\n',
            "</main></body></html>\n",
        ]
    )


def inline(content: str) -> str:
    """Text as HTML: everything escaped, `code` marked up."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(content))


def _figures(figures: Sequence[Figure]) -> str:
    if not figures:
        return ""
    tiles = "".join(
        f'<div class="figure"><p class="number">{escape(one.value)}</p>'
        f'<p class="what">{inline(one.what)}</p><p class="detail">{inline(one.detail)}</p></div>'
        for one in figures
    )
    return f'<div class="figures">{tiles}</div>\n'


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    return f'<dl class="facts">{lines}</dl>\n'


def _contents(sections: Sequence[Section]) -> str:
    links = "".join(f'<a href="#{one.key}">{escape(one.title)}</a>' for one in sections)
    return f'<nav aria-label="Contents">{links}</nav>\n'


def _section(section: Section) -> str:
    body = "".join(_blocks(section.blocks))
    return f'<section id="{section.key}"><h2>{escape(section.title)}</h2>\n{body}</section>\n'


def _blocks(blocks: Sequence[Block]) -> Iterator[str]:
    """Charts that follow each other share a grid."""
    for is_chart, group in groupby(blocks, lambda block: isinstance(block, Chart)):
        if is_chart:
            charts = "".join(_chart(one) for one in group if isinstance(one, Chart))
            yield f'<div class="charts">{charts}</div>\n'
        else:
            yield from map(_block, group)


def _block(block: Block) -> str:
    match block:
        case str():
            return f"<p>{inline(block)}</p>\n"
        case Subheading():
            return f"<h3>{inline(block.text)}</h3>\n"
        case Table():
            return _table(block)
        case Bullets():
            return _bullets(block)
        case Code():
            return f"<pre><code>{escape(block.text)}</code></pre>\n"
        case Chart():
            return _chart(block)
        case Picture():
            return _picture(block)


def _chart(chart: Chart) -> str:
    needed = list(WIDTHS)[chart.share - 1 :]
    drawn = "".join(f'<div class="on-{name}">{chart.draw(WIDTHS[name])}</div>' for name in needed)
    title = f"<figcaption>{inline(chart.title)}</figcaption>"
    return f'<figure class="chart share-{chart.share}">{title}{drawn}</figure>'


def _picture(picture: Picture) -> str:
    """As an image of its own: names inside one picture cannot meet those of another."""
    content = b64encode(picture.svg.encode()).decode("ascii")
    image = f'<img src="data:image/svg+xml;base64,{content}" alt="{escape(picture.title)}">'
    title = f"<figcaption>{inline(picture.title)}</figcaption>"
    return f'<figure class="picture">{title}{image}</figure>\n'


def _bullets(bullets: Bullets) -> str:
    items = [f"<li>{inline(item)}</li>" for item in bullets.items]
    shown, rest = items[: bullets.shown], items[bullets.shown :]
    body = f"<ul>{''.join(shown)}</ul>\n"
    if rest:
        more = f"<summary>{len(rest)} more</summary><ul>{''.join(rest)}</ul>"
        body += f"<details>{more}</details>\n"
    return body


def _table(table: Table) -> str:
    groups = ""
    if table.groups:
        cells = "".join(
            f'<th colspan="{span}" scope="colgroup">{escape(name)}</th>'
            if name
            else f'<td colspan="{span}"></td>'
            for name, span in table.groups
        )
        groups = f'<tr class="groups">{cells}</tr>'
    head = "".join(
        f'<th scope="col" class="{_kind(i, table)}">{inline(name)}</th>'
        for i, name in enumerate(table.head)
    )
    rows = "".join(f"<tr>{_cells(row, table)}</tr>" for row in table.rows)
    name = escape(table.caption or table.folded or ", ".join(table.head))
    body = (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{name}"><table>'
        f"<thead>{groups}<tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>\n"
    )
    if table.caption:
        body = f'<p class="caption">{inline(table.caption)}</p>{body}'
    if table.folded:
        return f"<details><summary>{inline(table.folded)}</summary>{body}</details>\n"
    return body


def _cells(row: Sequence[Cell], table: Table) -> str:
    return "".join(
        f'<td class="{_kind(i, table)}{f" {cell.tone}" if cell.tone else ""}">{inline(cell.text)}'
        + (f"<small>{inline(cell.sub)}</small>" if cell.sub else "")
        + "</td>"
        for i, cell in enumerate(row)
    )


def _kind(column: int, table: Table) -> str:
    if column >= table.names:
        return "value"
    return "name prose" if table.prose and column == table.names - 1 else "name"
