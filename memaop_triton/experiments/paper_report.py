"""Table, figure and JSON of a reproduced experiment."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.table import Table

from memaop_triton.experiments.numbers import Value, finite, mean_sd, plus_minus
from memaop_triton.experiments.paper import Experiment, Outcome, Scheme
from memaop_triton.experiments.published import ENERGY, EPOCHS, RUNS

# Dark with memory, light without; one hue per selection.
_COLOURS = {
    "topk + residual": "#1f4e9c",
    "topk": "#7fb0e6",
    "weightedk + residual": "#1b7837",
    "weightedk": "#86c98a",
    "randk + residual": "#b3400b",
    "randk": "#f4a261",
    "dense": "black",
}
_CIRCLE: dict[str, Any] = {"marker": "o", "markersize": 8, "markerfacecolor": "none"}


@dataclasses.dataclass(frozen=True)
class Summary:
    """All runs of one scheme.

    Attributes:
        scheme: The scheme.
        losses: [runs, epochs] validation losses.
        accuracies: [runs, epochs], or [runs, 0] for a regression.
        published: The authors' final loss, if there is one to compare with.
    """

    scheme: Scheme
    losses: npt.NDArray[np.float64]
    accuracies: npt.NDArray[np.float64]
    published: Value | None

    @property
    def final(self) -> Value:
        """Mean and sample standard deviation of the final loss."""
        return mean_sd(self.losses[:, -1])

    @property
    def z(self) -> float | None:
        """Difference to the authors' mean in standard errors; `None` if either is unknown."""
        runs = len(self.losses)
        if self.published is None or runs < 2:
            return None
        variance = self.final.sd**2 / runs + self.published.sd**2 / RUNS
        return (self.final.mean - self.published.mean) / math.sqrt(variance)


def summarise(experiment: Experiment, outcomes: list[Outcome]) -> list[Summary]:
    """One summary per scheme, in the experiment's order."""
    summaries = []
    for scheme in experiment.schemes():
        found = [outcome for outcome in outcomes if outcome.scheme == scheme]
        losses = np.array([outcome.losses for outcome in found])
        accuracies = np.array([outcome.accuracies for outcome in found])
        comparable = experiment.name == "energy" and losses.shape[1] == EPOCHS
        published = ENERGY[scheme] if comparable else None
        summaries.append(Summary(scheme, losses, accuracies, published))
    return summaries


def table(experiment: Experiment, summaries: list[Summary]) -> Table:
    """Final loss of every scheme, beside the authors' where there is one."""
    runs, epochs = summaries[0].losses.shape
    result = Table(title=f"{experiment.name}: mean ± sd, runs: {runs}, epochs: {epochs}")
    result.add_column("K", justify="right")
    result.add_column("scheme")
    titles = ["validation loss"]
    if summaries[0].published is not None:
        titles += [f"paper, {RUNS} runs", "Δ / s.e."]
    if experiment.name == "mnist":
        titles.append("accuracy %")
    for title in titles:
        result.add_column(title, justify="right")
    for k, group in itertools.groupby(summaries, key=lambda summary: summary.scheme.k):
        result.add_section()
        for summary in group:
            rows = experiment.batch_size if k is None else k
            result.add_row(str(rows), summary.scheme.label, *_numbers(summary))
    return result


def _numbers(summary: Summary) -> Iterator[str]:
    yield plus_minus(summary.final, 3)
    if summary.published is not None:
        yield plus_minus(summary.published, 3)
        yield "–" if summary.z is None else f"{summary.z:+.1f}"
    if summary.accuracies.size:
        yield plus_minus(mean_sd(100 * summary.accuracies[:, -1]), 2)


def as_json(experiment: Experiment, seed: int, summaries: list[Summary]) -> dict[str, Any]:
    """Settings, every run's final values, mean curves and the comparison."""
    runs, epochs = summaries[0].losses.shape
    return {
        "experiment": experiment.name,
        "runs": runs,
        "epochs": epochs,
        "seed": seed,
        "schemes": [_scheme_json(summary) for summary in summaries],
    }


def _scheme_json(summary: Summary) -> dict[str, Any]:
    return {
        **summary.scheme._asdict(),
        "final_loss": _value_json(summary.final),
        "final_losses": finite(summary.losses[:, -1]),
        "final_accuracies": finite(summary.accuracies[:, -1:]),
        "loss_curve": finite(summary.losses.mean(0)),
        "published": None if summary.published is None else _value_json(summary.published),
        "standard_errors_apart": summary.z,
    }


def _value_json(value: Value) -> dict[str, float | None]:
    return dict(zip(("mean", "sd"), finite(value), strict=True))


def save_figure(path: Path, experiment: Experiment, summaries: list[Summary]) -> None:
    """Draw validation loss against epoch, a panel per K; circles are the authors' final losses."""
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    panels = figure.subplots(1, len(experiment.ks), sharey=True)
    for panel, k in zip(panels, experiment.ks, strict=True):
        for summary in summaries:
            if summary.scheme.k in (k, None):
                _draw(panel, summary)
        panel.set(title=f"K = {k} of M = {experiment.batch_size}", xlabel="epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3, which="both", linewidth=0.5)
        if experiment.name == "energy":
            panel.set_yscale("log")
    panels[0].set_ylabel("validation loss")
    handles, labels = panels[0].get_legend_handles_labels()
    if summaries[0].published is not None:
        handles.append(Line2D([], [], color="grey", linestyle="none", **_CIRCLE))
        labels.append("the authors' final loss")
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    runs = len(summaries[0].losses)
    figure.suptitle(f"{experiment.name}: mean over {runs} run{'s' if runs > 1 else ''}")
    figure.savefig(path, dpi=130)


def _draw(panel: Any, summary: Summary) -> None:
    label = summary.scheme.label
    colour = _COLOURS[label]
    losses = summary.losses.mean(0)
    epochs = np.arange(1, len(losses) + 1)
    marker = "o" if len(losses) == 1 else None
    panel.plot(epochs, losses, color=colour, linewidth=1.6, marker=marker, label=label)
    if summary.published is not None:
        panel.plot(epochs[-1], summary.published.mean, color=colour, **_CIRCLE)
