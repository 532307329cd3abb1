"""The look of the charts, and charts as SVG.

matplotlib draws with placeholder colours. In the page they become the custom properties of its
style sheet, so that one picture serves light and dark; in a file of its own the light values.
"""

from __future__ import annotations

import io
import re
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

STYLE_SHEET = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
# The values of a light page come first in the style sheet.
_LIGHT: dict[str, str] = dict(reversed(re.findall(r"--([\w-]+): (#\w{6})", STYLE_SHEET)))
_NAMES = sorted(_LIGHT)


def colour(name: str) -> str:
    """The placeholder of a colour that the style sheet calls `--name`."""
    return f"#{_NAMES.index(name):02x}fedc"


INK, SOFT, RULE, PAPER = map(colour, ("ink", "soft", "rule", "paper"))

# Sizes are in CSS pixels of a chart's own width.
_LOOK: dict[Any, Any] = {
    "font.size": 12,
    "text.color": INK,
    "text.parse_math": False,
    "axes.facecolor": "none",
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.linewidth": 1,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": RULE,
    "grid.linewidth": 1,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "ytick.left": False,
    "lines.solid_capstyle": "butt",
    "legend.frameon": False,
    "svg.fonttype": "none",
}
# A decorator for functions that draw.
styled = mpl.rc_context(_LOOK)


@styled
def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in CSS pixels."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")
    FigureCanvasSVG(figure)
    return figure


def svg(figure: Figure, title: str, *, themed: bool = True) -> str:
    """The figure as an SVG that is the same for the same figure and title.

    The id of an artist, if it was given one, becomes a tooltip. Pictures on one page need different
    titles: the names of the shapes inside are made from it.

    Args:
        figure: By a function that is `styled`.
        title: Read out by screen readers.
        themed: Whether it takes colours and font from the page that holds it; else it is a file
            with a ground of its own.
    """
    file = io.StringIO()
    # Texts of ticks are made only here, with the current style.
    with mpl.rc_context(_LOOK | {"svg.hashsalt": title}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    width, height = (72 * inches for inches in figure.get_size_inches())
    body = re.sub(r"^.*?<svg[^>]*>|<metadata>.*</metadata>", "", file.getvalue(), flags=re.DOTALL)
    body = re.sub(r'<g id="tip:([^"]*)">', r"<g><title>\1</title>", body)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("<g/>", "")
    body = re.sub(r"font-family: [^;\"]*(; )?", "", body)
    body = re.sub(r' transform="rotate\(-0 [^"]*"', "", body)
    # A tenth of a pixel is enough.
    body = re.sub(r' (?:d|x|y|width|height|transform)="[^"]*"', _rounded, body)
    body = re.sub(r">\s+<", "><", body).replace("xlink:href", "href")
    label = escape(title.replace("`", ""))
    box = f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}"'
    if themed:
        body = re.sub(r"#(\w\w)fedc", lambda hit: f"var(--{_name(hit)})", body)
        return f"<svg {box}>{body.strip()}"
    body = re.sub(r"#(\w\w)fedc", lambda hit: _LIGHT[_name(hit)], body)
    ground = f'<rect width="100%" height="100%" fill="{_LIGHT["paper"]}"/>'
    root = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" {box}'
    return f'{root} font-family="system-ui, sans-serif">{ground}{body.strip()}\n'


def _rounded(attribute: re.Match[str]) -> str:
    return re.sub(r"(\.\d)\d+", r"\1", re.sub(r"\s+", " ", attribute[0]))


def _name(placeholder: re.Match[str]) -> str:
    return _NAMES[int(placeholder[1], 16)]
