"""The demo's figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from memaop_triton.experiments.demo.report import seeds_of
from memaop_triton.experiments.demo.training import Result, Training

_STYLES: dict[str, dict[str, Any]] = {
    "dense": {"color": "black", "linewidth": 2.4},
    "auto": {"color": "#2a9d4a", "linewidth": 2.0},
    # The dashes leave the others visible where they coincide.
    "default": {"color": "#1f77b4", "linewidth": 2.0, "linestyle": "--"},
    "paper": {"color": "#d1495b"},
}


def save(path: Path, results: list[Result], training: Training) -> None:
    """Draw test loss and accuracy against steps and against seconds.

    A line is the mean over seeds, the band around it reaches from the lowest to the highest. The
    seconds are those of the steps that were taken.
    """
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    # The paper's is drawn first, below the others.
    for result in sorted(results, key=lambda one: one.scheme.key != "paper"):
        axes: tuple[Sequence[float], ...] = (result.steps, result.seconds_at_evaluations())
        for column, x in enumerate(axes):
            _draw(panels[0, column], x, np.array(result.losses), result.scheme.key)
            _draw(panels[1, column], x, 100 * np.array(result.accuracies), result.scheme.key)
    _style(panels)
    lines = {line.get_label(): line for line in panels[0, 0].get_lines()}
    figure.legend(
        [lines[result.scheme.key] for result in results],
        [_legend(result) for result in results],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    spread = ", bands from lowest to highest" if training.seeds > 1 else ""
    figure.suptitle(
        f"{training.network}, mean over {seeds_of(training)}{spread}",
        fontsize=12,
    )
    figure.savefig(path, dpi=130)


def _draw(panel: Any, x: Sequence[float], values: Any, key: str) -> None:
    """One scheme's line and band; `values` is [seeds, points]."""
    (line,) = panel.plot(x, values.mean(0), marker=".", label=key, **_STYLES[key])
    if len(values) > 1:
        band = {"color": line.get_color(), "alpha": 0.12, "linewidth": 0}
        panel.fill_between(x, values.min(0), values.max(0), **band)


def _style(panels: Any) -> None:
    panels[0, 0].set_yscale("log")
    panels[0, 0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0, 0].yaxis.set_major_formatter("{x:g}")
    panels[0, 0].yaxis.set_minor_formatter(NullFormatter())
    panels[0, 0].set_ylabel("test loss, nats")
    panels[1, 0].set_ylabel("test accuracy, %")
    panels[1, 0].set_xlabel("steps")
    panels[1, 1].set_xlabel("seconds of training steps")
    for panel in panels.flat:
        panel.grid(alpha=0.3, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)


def _legend(result: Result) -> str:
    scheme = result.scheme
    name = f" ({scheme.key})" if scheme.key in ("default", "paper") else ""
    share = "" if scheme.key == "dense" else f": {100 * result.cost.flops:.0f} % of dW's FLOPs"
    return f"{scheme.label}{name}{share}{' in the end' if scheme.key == 'auto' else ''}"
