"""A report as HTML, as Markdown for GitHub, and its pictures as files, by templates."""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from memaop_triton.bench.report import figures
from memaop_triton.bench.report.document import Chart, Document
from memaop_triton.bench.report.methods import PAPER


def write(report: Document, folder: Path, name: str) -> list[Path]:
    """Write `name`.html, `name`.md and the pictures that have a file of their own to `folder`.

    Raises:
        OSError: The folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        f"{name}.html": _render("page.html.jinja", report),
        f"{name}.md": _render("page.md.jinja", report, page=f"{name}.html"),
    }
    for section in report.sections:
        for block in section.blocks:
            if isinstance(block, Chart) and block.file:
                contents[block.file] = figures.svg(block.figure, block.title, themed=False)
    for file, content in contents.items():
        (folder / file).write_text(content, encoding="utf-8")
    return [folder / file for file in contents]


def _render(template: str, report: Document, **more: str) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html.jinja"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"inline": _inline, "plain": _plain, "svg": _svg}
    style = figures.STYLE_SHEET
    return environment.get_template(template).render(
        report=report, style=style, paper=PAPER, **more
    )


def _inline(content: str) -> Markup:
    """Text as HTML: everything escaped, `code` marked up."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(content))))


def _plain(content: str) -> str:
    """Text on one line that GitHub takes as text: no HTML, no links, no columns, but `code`."""
    content = " ".join(content.split()).replace("&", "&amp;")
    content = content.replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([|\[\]*\\])", r"\\\1", content)


def _svg(figure: Figure, title: str) -> Markup:
    return Markup(figures.svg(figure, title))
