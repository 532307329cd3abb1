"""Table, figure and JSON of the demo."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table

from memaop_triton.experiments.data import CLASSES
from memaop_triton.experiments.demo import Curve, Scheme, SchemeResult, Settings
from memaop_triton.units import human_bytes

_COLOURS = {
    "dense": "black",
    "default": "#1f77b4",
    "priority": "#2a9d4a",
    "paper": "#d1495b",
    "signed": "#e8912d",
}


def table(results: list[SchemeResult], settings: Settings, dataset: str) -> Table:
    """Accuracy, times beside dense, and memory of every scheme."""
    result = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        caption="priority + subspace is MemAOPConfig(), topk + residual the paper's scheme",
        title=f"{dataset}: K/M = {settings.ratio:g}, batch {settings.batch_size}, "
        f"width {settings.width}, {_optimizer(settings)}, {settings.epochs} epochs, "
        f"{_seeds(settings)}",
    )
    result.add_column("scheme", no_wrap=True)
    for name in ("accuracy %", "step ms", "speed", "dW ms", "speed", "memory"):
        result.add_column(name, justify="right", no_wrap=True)
    dense = results[0]
    for one in results:
        result.add_row(
            one.scheme.label,
            _accuracy(one.accuracies),
            f"{1e3 * one.step_median:.1f}",
            f"{dense.step_median / one.step_median:.2f}×",
            f"{1e3 * one.gradient_median:.2f}",
            f"{dense.gradient_median / one.gradient_median:.2f}×",
            human_bytes(one.memory_bytes),
        )
    return result


def explanation() -> str:
    """Two lines below the table: what it means, and what was measured."""
    return (
        "A scheme is worth having where it reaches dense's accuracy at a speed (dense time / its "
        f"time) above 1; the head of {CLASSES} outputs is dense in all, scoring costs more there.\n"
        f"Medians on the CPU, {torch.get_num_threads()} thread(s), schemes in turn on each batch; "
        "step is forward, backward and update, dW the weight gradients of the three hidden layers."
    )


def _accuracy(values: list[float]) -> str:
    mean = 100 * statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}"


def save_json(path: Path, results: list[SchemeResult], settings: Settings, dataset: str) -> None:
    """Write settings, final numbers and the curves of every seed."""
    content = {
        "dataset": dataset,
        "settings": dataclasses.asdict(settings),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "schemes": [_as_json(result, results[0]) for result in results],
    }
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _as_json(result: SchemeResult, dense: SchemeResult) -> dict[str, Any]:
    return {
        "key": result.scheme.key,
        "label": result.scheme.label,
        "accuracies": result.accuracies,
        "step_seconds": result.step_median,
        "step_speed": dense.step_median / result.step_median,
        "weight_grad_seconds": result.gradient_median,
        "weight_grad_speed": dense.gradient_median / result.gradient_median,
        "memory_bytes": result.memory_bytes,
        "curves": [_curve_json(curve) for curve in result.curves],
    }


def _curve_json(curve: Curve) -> dict[str, Any]:
    content = dataclasses.asdict(curve)
    content["loss"] = [loss if math.isfinite(loss) else None for loss in curve.loss]
    return content


def save_figure(path: Path, results: list[SchemeResult], settings: Settings, dataset: str) -> None:
    """Draw loss and accuracy against steps and against seconds, the mean over seeds a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    for result in results:
        steps = np.array(result.curves[0].steps)
        loss, accuracy = _mean(result, lambda c: c.loss), _mean(result, lambda c: c.accuracy)
        style = {
            "color": _COLOURS[result.scheme.key],
            "label": _legend(result.scheme),
            "marker": "o" if len(steps) == 1 else None,
            "linewidth": 2.2 if result.scheme.key in ("dense", "default") else 1.5,
        }
        for column, x in enumerate((steps, steps * result.step_median)):
            panels[0, column].plot(x, loss, **style)
            panels[1, column].plot(x, 100 * accuracy, **style)
    panels[0, 0].set_yscale("log")
    panels[0, 0].set_ylabel("training loss")
    panels[1, 0].set_ylabel("test accuracy, %")
    panels[1, 0].set_xlabel("steps")
    panels[1, 1].set_xlabel("seconds (steps × the scheme's median step time)")
    for panel in panels.flat:
        panel.grid(alpha=0.3, linewidth=0.5)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(
        f"{dataset}: K/M = {settings.ratio:g}, batch {settings.batch_size}, "
        f"width {settings.width}, {_optimizer(settings)}, mean over {_seeds(settings)}"
    )
    figure.savefig(path, dpi=130)


def _optimizer(settings: Settings) -> str:
    return f"{settings.optimizer} {settings.lr:g}"


def _seeds(settings: Settings) -> str:
    return f"{settings.seeds} seed{'s' if settings.seeds > 1 else ''}"


def _legend(scheme: Scheme) -> str:
    return scheme.label + (f" ({scheme.key})" if scheme.key in ("default", "paper") else "")


def _mean(result: SchemeResult, value: Callable[[Curve], list[Any]]) -> Any:
    return np.mean([value(curve) for curve in result.curves], axis=0)
