"""Table and JSON of the demo."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table

from memaop_triton.experiments.demo.training import Result, Training
from memaop_triton.experiments.numbers import finite, mean_sd, plus_minus
from memaop_triton.monitor.units import human_bytes


def table(results: list[Result], training: Training) -> Table:
    """Accuracy, loss, times beside dense, and memory of every scheme."""
    result = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=0,  # 80 columns are just enough
        caption=_caption(results),
        title=f"{training.title}, {seeds_of(training)}",
    )
    result.add_column("scheme", no_wrap=True)
    for name in (
        "accuracy %", "loss", "time s", "speed", "step ms", "dW ms", "FLOPs", "memory",
    ):  # fmt: skip
        result.add_column(name, justify="right", no_wrap=True)
    dense = results[0]
    for one in results:
        result.add_row(
            one.scheme.label,
            plus_minus(mean_sd(100 * np.array(one.accuracies)[:, -1]), 1),
            f"{np.array(one.losses)[:, -1].mean():.3f}",
            f"{one.seconds:.1f}",
            f"{dense.seconds / one.seconds:.2f}×",
            f"{1e3 * one.step_median:.1f}",
            f"{1e3 * one.cost.seconds:.2f}",
            f"{100 * one.cost.flops:.0f} %",
            human_bytes(one.cost.memory_bytes),
        )
    return result


def _caption(results: list[Result]) -> str:
    names = {
        "default": "priority + subspace is MemAOPConfig(ratio=K/M)",
        "paper": "topk + residual the paper's scheme",
    }
    return ", ".join(names[one.scheme.key] for one in results if one.scheme.key in names)


def decisions(results: list[Result]) -> Iterator[str]:
    """What "auto" decided, and why: the first line of `model_report` for every seed."""
    for result in results:
        for seed, line in enumerate(result.decisions):
            yield f"{result.scheme.key}, seed {seed}: {line}"


def explanation(training: Training) -> str:
    """Lines below the table: how to read it, and how it was measured."""
    return (
        "A scheme is worth having where it reaches dense's accuracy and loss at a speed (dense's "
        "seconds / its) above 1.\n"
        "Seconds are those of all steps of a training (forward, backward and update; what auto "
        "spends on observing, timing and trying is among them), step ms their median.\n"
        f"Accuracy and loss are of {len(training.data.y_test):,} test examples. CPU, "
        f"{torch.get_num_threads()} thread(s), the schemes in turn; dW are the weight gradients of "
        "all layers but the head, as they are computed in the end, FLOPs theirs beside dense's."
    )


def seeds_of(training: Training) -> str:
    """`3 seeds`."""
    return f"{training.seeds} seed{'s' if training.seeds > 1 else ''}"


def as_json(results: list[Result], training: Training) -> dict[str, Any]:
    """Settings, final numbers and the curves of every seed."""
    return {
        "settings": training.settings,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tested": len(training.data.y_test),
        "schemes": [_scheme_json(result, results[0]) for result in results],
    }


def _scheme_json(result: Result, dense: Result) -> dict[str, Any]:
    return {
        "key": result.scheme.key,
        "label": result.scheme.label,
        "accuracies": [curve[-1] for curve in result.accuracies],
        "losses": finite([curve[-1] for curve in result.losses]),
        "seconds": result.seconds,
        "speed": dense.seconds / result.seconds,
        "step_seconds": result.step_median,
        "step_speed": dense.step_median / result.step_median,
        "weight_grad_seconds": result.cost.seconds,
        "weight_grad_speed": dense.cost.seconds / result.cost.seconds,
        "weight_grad_flops": result.cost.flops,
        "memory_bytes": result.cost.memory_bytes,
        "decisions": result.decisions,
        "seconds_at_evaluations": result.seconds_at_evaluations(),
        "curves": [
            {"steps": result.steps, "loss": finite(losses), "accuracy": accuracies}
            for losses, accuracies in zip(result.losses, result.accuracies, strict=True)
        ],
    }
