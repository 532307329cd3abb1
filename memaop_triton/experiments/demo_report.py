"""Table, figure and JSON of the demo."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich import box
from rich.table import Table

from memaop_triton.experiments.data import CLASSES
from memaop_triton.experiments.demo import OPTIMIZERS, SchemeResult, Settings
from memaop_triton.experiments.numbers import finite, mean_sd, plus_minus
from memaop_triton.units import human_bytes

_STYLES: dict[str, dict[str, Any]] = {
    "dense": {"color": "black", "linewidth": 2.4},
    # The dashes leave dense visible where both coincide.
    "default": {"color": "#1f77b4", "linewidth": 2.0, "linestyle": "--"},
    "priority": {"color": "#2a9d4a"},
    "paper": {"color": "#d1495b"},
    "signed": {"color": "#e8912d"},
}


def table(results: list[SchemeResult], settings: Settings) -> Table:
    """Accuracy, times beside dense, and memory of every scheme."""
    result = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption="priority + subspace is MemAOPConfig(), topk + residual the paper's scheme",
        title=f"{settings.dataset}: K/M = {settings.ratio:g}, batch {settings.batch_size}, "
        f"width {settings.width}, {_optimizer(settings)}, {settings.epochs} epochs, "
        f"{_seeds(settings)}",
    )
    result.add_column("scheme", no_wrap=True)
    for name in ("accuracy %", "step ms", "speed", "dW ms", "speed", "FLOPs", "memory"):
        result.add_column(name, justify="right", no_wrap=True)
    dense = results[0]
    for one in results:
        result.add_row(
            one.scheme.label,
            plus_minus(mean_sd(100 * np.array(one.accuracies)[:, -1]), 1),
            f"{1e3 * one.step_median:.1f}",
            f"{dense.step_median / one.step_median:.2f}×",
            f"{1e3 * one.gradient_median:.2f}",
            f"{dense.gradient_median / one.gradient_median:.1f}×",
            f"{100 * one.gradient_flops:.0f} %",
            human_bytes(one.memory_bytes),
        )
    return result


def explanation() -> str:
    """Two lines below the table: how to read it, and how it was measured."""
    return (
        "A scheme is worth having where it reaches dense's accuracy at a speed (dense time / its "
        f"time) above 1; the head of {CLASSES} outputs is dense in all, scoring costs more there.\n"
        f"Medians on the CPU, {torch.get_num_threads()} thread(s), schemes in turn on each batch; "
        "step is forward, backward and update, dW the weight gradients of the three hidden layers, "
        "FLOPs theirs beside dense's."
    )


def as_json(results: list[SchemeResult], settings: Settings) -> dict[str, Any]:
    """Settings, final numbers and the curves of every seed."""
    return {
        "settings": dataclasses.asdict(settings),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "schemes": [_scheme_json(result, results[0]) for result in results],
    }


def _scheme_json(result: SchemeResult, dense: SchemeResult) -> dict[str, Any]:
    return {
        "key": result.scheme.key,
        "label": result.scheme.label,
        "accuracies": [curve[-1] for curve in result.accuracies],
        "step_seconds": result.step_median,
        "step_speed": dense.step_median / result.step_median,
        "weight_grad_seconds": result.gradient_median,
        "weight_grad_speed": dense.gradient_median / result.gradient_median,
        "weight_grad_flops": result.gradient_flops,
        "memory_bytes": result.memory_bytes,
        "curves": [
            {"steps": result.steps, "loss": finite(losses), "accuracy": accuracies}
            for losses, accuracies in zip(result.losses, result.accuracies, strict=True)
        ],
    }


def save_figure(path: Path, results: list[SchemeResult], settings: Settings) -> None:
    """Draw loss and accuracy against steps and against seconds.

    A line is the mean over seeds, the band around it reaches from the lowest to the highest.
    """
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    # Dense and the default are drawn last, above the others.
    for result in sorted(results, key=lambda one: one.scheme.key in ("dense", "default")):
        for column, seconds in enumerate((1.0, result.step_median)):
            x = seconds * np.array(result.steps)
            _draw(panels[0, column], x, np.array(result.losses), result.scheme.key)
            _draw(panels[1, column], x, 100 * np.array(result.accuracies), result.scheme.key)
    _style(panels)
    lines = {line.get_label(): line for line in panels[0, 0].get_lines()}
    figure.legend(
        [lines[result.scheme.key] for result in results],
        [_legend(result) for result in results],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    spread = ", bands from lowest to highest" if settings.seeds > 1 else ""
    figure.suptitle(
        f"{settings.dataset}: three hidden layers of {settings.width} units, weight gradients dW "
        f"from {100 * settings.ratio:.3g} % of the rows\nbatches of {settings.batch_size}, "
        f"{_optimizer(settings)}, mean over {_seeds(settings)}{spread}",
        fontsize=12,
    )
    figure.savefig(path, dpi=130)


def _optimizer(settings: Settings) -> str:
    return f"{OPTIMIZERS[settings.optimizer].__name__} at {settings.lr:g}"


def _seeds(settings: Settings) -> str:
    return f"{settings.seeds} seed{'s' if settings.seeds > 1 else ''}"


def _draw(panel: Any, x: Any, values: Any, key: str) -> None:
    """One scheme's line and band; `values` is [seeds, points]."""
    marker = "o" if len(x) == 1 else None
    (line,) = panel.plot(x, values.mean(0), marker=marker, label=key, **_STYLES[key])
    if len(values) > 1:
        band = {"color": line.get_color(), "alpha": 0.12, "linewidth": 0}
        panel.fill_between(x, values.min(0), values.max(0), **band)


def _style(panels: Any) -> None:
    panels[0, 0].set_yscale("log")
    panels[0, 0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0, 0].yaxis.set_major_formatter("{x:g}")
    panels[0, 0].yaxis.set_minor_formatter(NullFormatter())
    panels[0, 0].set_ylabel("training loss, nats")
    panels[1, 0].set_ylabel("test accuracy, %")
    panels[1, 0].set_xlabel("steps")
    panels[1, 1].set_xlabel("seconds (steps × the scheme's median step time)")
    for panel in panels.flat:
        panel.grid(alpha=0.3, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)


def _legend(result: SchemeResult) -> str:
    scheme = result.scheme
    name = f" ({scheme.key})" if scheme.key in ("default", "paper") else ""
    return f"{scheme.label}{name}: {100 * result.gradient_flops:.0f} % of dW's FLOPs"
