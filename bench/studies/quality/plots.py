"""Charts of a task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memaop_triton.bench.report import text
from memaop_triton.bench.report.figures import INK, RULE, colour, new_figure, styled
from memaop_triton.bench.studies.quality.progress import TOLERANCE, Pair
from memaop_triton.bench.studies.quality.results import Results
from memaop_triton.bench.studies.quality.schemes import (
    DENSE,
    RATIO,
    RATIO_OF_BOTH,
    SCHEMES,
    SHORTER,
    Cell,
    cells,
)
from memaop_triton.bench.studies.quality.tasks import Task

# The schemes with curves; those of all schemes would overlap.
CURVES = (
    DENSE,
    SHORTER,
    "budget",
    "budget-allocated",
    "priority",
    "topk-residual",
    "topk-signed",
    "budget-both",
    "budget-projected-allocated",
)
# By the style sheet where the performance report has the scheme too; the others are of a middle
# lightness, that light and dark pages both show.
_COLOURS = {
    DENSE: INK,
    SHORTER: colour("baseline"),
    "budget": "#d1348b",
    "budget-both": "#e58fc0",
    "budget-projected": "#4a8f4a",
    "budget-projected-allocated": "#6fae4f",
    "budget-allocated": colour("default"),
    "priority-allocated": "#7fc7bd",
    "subspace": "#8a63d2",
    "subspace-both": "#b39ddb",
    "priority": colour("priority"),
    "priority-both": "#6cc0b3",
    "topk": colour("topk"),
    "topk-residual": colour("topk-residual"),
    "topk-signed": colour("topk-signed"),
    "topk-signed-half": "#c590c7",
    "randk-residual": "#e8955f",
    "weightedk-residual": "#f2bd93",
    "randk-signed": "#dc92de",
}
_OTHERS = ("#6a737d", "#a0a9b2", "#c9a300", "#9aa800")
_MARKERS = "osD^vPX<>*"
_TASK_COLOURS = (
    *("#d1348b", "#8a63d2", "#2f80c2", "#4a8f4a", "#c9a300", "#dd7230"),
    *("#3aa39b", "#9c5b3c", "#6a737d"),
)
# Below it a scale of differences is linear.
_LINEAR = {"accuracy": 0.5, "loss": 0.02}


@styled
def curves(results: Results, task: Task) -> Figure:
    """The metric on the sample against steps, backward FLOPs and seconds."""
    shown = [cell for cell in cells(task.name) if cell.scheme in CURVES and _is_shown(cell)]

    def flops(cell: Cell) -> float | None:
        run = results.any_run(cell)
        return None if run is None else run.backward / 1e3

    def seconds(cell: Cell) -> float | None:
        ms = results.step_ms(cell)
        return None if ms is None else ms / 1e3

    figure, panels = _figure(3, 400, sharey=True)
    axes: tuple[tuple[str, Callable[[Cell], float | None]], ...] = (
        ("steps", lambda cell: 1.0),
        ("backward FLOPs, 10¹²", flops),
        ("seconds (steps × median step)", seconds),
    )
    for panel, (label, unit) in zip(panels, axes, strict=True):
        for cell in shown:
            points, scale = results.mean_curve(cell), unit(cell)
            if points and scale is not None:
                x, y = [step * scale for step, _ in points], [value for _, value in points]
                name = SCHEMES[cell.scheme].label
                if cell.scheme == SHORTER:
                    name = f"dense, {cell.ratio} of the steps"
                panel.plot(x, y, **_line(cell.scheme), marker=".", markersize=8, label=name)
        if not panel.lines:
            panel.text(0.5, 0.5, "not measured yet", ha="center", transform=panel.transAxes)
        panel.set_xlabel(label)
    panels[0].set_ylabel(_metric(task))
    _limit(panels[0], task)
    _legend(figure, panels[0])
    return figure


def _is_shown(cell: Cell) -> bool:
    """Whether it is of the ratio at which schemes are compared."""
    if cell.config is None:
        return True
    return cell.ratio == (RATIO_OF_BOTH if SCHEMES[cell.scheme].cheapens_both else RATIO)


def has_cost(cell: Cell) -> bool:
    """Whether the FLOPs of a cell's steps are known: a scheme with a given ratio."""
    return SCHEMES[cell.scheme].has_ratios


@styled
def trade_off(results: Results, task: Task) -> Figure:
    """Difference to dense against the FLOPs of the weight gradients, all schemes."""
    figure, (panel,) = _figure(1, 500)
    for place, name in enumerate(SCHEMES):
        samples = []
        for cell in cells(task.name):
            run, difference = results.any_run(cell), results.difference(cell)
            if cell.scheme == name and has_cost(cell) and run and difference is not None:
                known = difference.half_width if difference.pairs > 1 else 0.0
                samples.append((run.weight_grads, difference.mean, known))
        if samples:
            x, y, half = zip(*sorted(samples), strict=True)
            marker = _MARKERS[place % len(_MARKERS)]
            panel.errorbar(
                x, y, yerr=half, **_line(name), marker=marker, markersize=5, capsize=2,
                elinewidth=0.7, label=SCHEMES[name].label,
            )  # fmt: skip
    panel.axhline(0, color=INK, linewidth=1)
    panel.set_yscale("symlog", linthresh=_LINEAR[task.metric])
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda value, _: text.ratio(value))
    panel.set_xlabel("FLOPs of all weight gradients, as a fraction of dense")
    panel.set_ylabel(f"{_metric(task)}, difference to dense")
    _legend(figure, panel)
    return figure


@styled
def calibration(pairs: Sequence[Pair], predict: Callable[[Pair], float]) -> Figure:
    """Measured progress against predicted progress, a colour for each task."""
    figure, (panel,) = _figure(1, 560)
    lowest = min(min(predict(pair), pair.measured) for pair in pairs) - 0.05
    ends = (lowest, 1.05)
    below, above = ([end + sign * TOLERANCE for end in ends] for sign in (-1, 1))
    panel.fill_between(ends, below, above, color=RULE, alpha=0.6, linewidth=0)
    panel.plot(ends, ends, color=INK, linewidth=1)
    for place, task in enumerate(dict.fromkeys(pair.cell.task for pair in pairs)):
        tint = _TASK_COLOURS[place % len(_TASK_COLOURS)]
        marker = _MARKERS[place % len(_MARKERS)]
        for pair in pairs:
            if pair.cell.task == task:
                known = 0.0 if math.isnan(pair.error) else pair.error
                panel.errorbar(
                    predict(pair), pair.measured, yerr=known, color=tint, marker=marker,
                    markersize=7, markerfacecolor=tint if pair.is_decided else "none",
                    elinewidth=0.7, linestyle="none",
                )  # fmt: skip
        panel.plot([], [], color=tint, marker=marker, linestyle="none", label=task)
    panel.set_xlim(ends)
    panel.set_xlabel("predicted progress")
    panel.set_ylabel("measured progress, dense = 1")
    _legend(figure, panel)
    return figure


def _figure(panels: int, height: float, *, sharey: bool = False) -> tuple[Figure, Sequence[Axes]]:
    figure = new_figure(1040, height)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, panels, sharey=sharey, squeeze=False)[0]
    for panel in axes:
        panel.grid(visible=True, axis="both", linewidth=0.6)
    return figure, axes


def _line(name: str) -> dict[str, Any]:
    place = list(SCHEMES).index(name)
    tint = _COLOURS.get(name, _OTHERS[place % len(_OTHERS)])
    return {"color": tint, "linewidth": 2.5 if name in (DENSE, "budget") else 1.5}


def _limit(panel: Any, task: Task) -> None:
    """Limit the axis to values near dense; schemes far behind are cut off."""
    values = [value for line in panel.lines for value in line.get_ydata()]
    best = max(values) if task.metric == "accuracy" else min(values)
    if task.metric == "accuracy":
        panel.set_ylim(max(min(values), best - 25) - 0.5, best + 0.5)
    else:
        panel.set_ylim(best - 0.05, min(max(values), best + 1.5) + 0.05)


def _metric(task: Task) -> str:
    return "test accuracy, %" if task.metric == "accuracy" else "validation loss, nats"


def _legend(figure: Any, panel: Any) -> None:
    handles, labels = panel.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
