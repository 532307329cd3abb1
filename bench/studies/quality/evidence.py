"""Sections of the page that explain: noise of a step, cross terms, learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from memaop_triton.bench.report import text
from memaop_triton.bench.report.document import NOTHING, Block, Section, Table
from memaop_triton.bench.report.document import Cell as Entry
from memaop_triton.bench.studies.quality.crossterms import CrossTerms
from memaop_triton.bench.studies.quality.noise import Noise
from memaop_triton.bench.studies.quality.results import Results
from memaop_triton.bench.studies.quality.sections import number
from memaop_triton.bench.studies.quality.tasks import TASKS
from memaop_triton.bench.studies.quality.tuning import best_rate


def cross_terms_section(results: Results) -> Section:
    """The sum of gradients on frozen weights."""
    lines = results.cross_terms
    title = "Cross terms of the row memory, on frozen weights"
    if not lines:
        return Section("cross-terms", title, ["Not run yet."])
    blocks: list[Block] = [
        "S is the sum of the weight gradients that a method returns over T batches on frozen "
        "weights, D that of the dense ones. A slot selected at age a adds a(a − 1) products that "
        "pair rows of different batches. With the paper's memory these have the mean ḡx̄ᵀ and "
        "inflate S the more the smaller K/M is; random signs leave them no mean. `cross` is the "
        "norm, over D's, of what S has beyond the products of the rows returned so far. "
        "`predicted` is ‖S‖/‖D‖ from K/M, T and the moments of X and G alone.",
    ]
    for task, ratio, batches in dict.fromkeys((one.task, one.ratio, one.batches) for one in lines):
        mine = [one for one in lines if (one.task, one.ratio) == (task, ratio)]
        name = f"{TASKS[task].title}, r = {text.ratio(ratio)}, T = {batches}"
        blocks.append(_cross_terms_table(mine, f"{name}: mean over layers, least and most below."))
    return Section("cross-terms", title, blocks)


def _cross_terms_table(lines: Sequence[CrossTerms], caption: str) -> Table:
    rows = []
    for method in dict.fromkeys((one.selection, one.memory) for one in lines):
        mine = [one for one in lines if (one.selection, one.memory) == method]
        columns = (_over_layers(mine, name) for name in ("norm", "predicted", "cosine", "cross"))
        rows.append((Entry(" + ".join(method)), *columns))
    head = ("method", "‖S‖/‖D‖", "predicted", "cosine", "cross")
    return Table(head, tuple(rows), caption=caption)


def _over_layers(lines: Sequence[CrossTerms], column: str) -> Entry:
    by_layer: dict[str, list[float]] = {}
    for one in lines:
        by_layer.setdefault(one.layer, []).append(getattr(one, column))
    # Norms of independent draws add up by their squares.
    mean = fmean if column == "cosine" else lambda values: math.sqrt(fmean(v * v for v in values))
    values = [mean(one) for one in by_layer.values()]
    if math.isnan(values[0]):
        return NOTHING
    return Entry(f"{fmean(values):.3g}", f"{min(values):.3g} to {max(values):.3g}")


def noise_section(results: Results) -> Section:
    """The variance of one step's weight gradients."""
    title = "Noise of one step"
    if not results.noise:
        return Section("noise", title, ["Not run yet."])
    blocks: list[Block] = [
        "Variance of one batch's weight gradient by the draws, over its squared norm, at equal "
        "FLOPs: without a subspace, and with one of the inputs or of the gradients at the rank "
        "that does best; below the rank and the rows that are left to draw. `batch` is the "
        "variance that the dense gradient has itself, from the differences of its rows.",
    ]
    for where in dict.fromkeys((one.task, one.step, one.budget) for one in results.noise):
        mine = [one for one in results.noise if (one.task, one.step, one.budget) == where]
        task, step, budget = where
        caption = f"{TASKS[task].title}, after {step} steps, {text.ratio(budget)} of dense's FLOPs"
        rows = [
            _noise_of_layer([one for one in mine if one.layer == layer])
            for layer in dict.fromkeys(one.layer for one in mine)
        ]
        head = ("layer", "batch", "no subspace", "inputs' side", "gradients' side")
        blocks.append(Table(head, tuple(rows), caption=caption))
    return Section("noise", title, blocks)


def _noise_of_layer(lines: Sequence[Noise]) -> tuple[Entry, ...]:
    best = min(lines, key=lambda one: one.variance)
    entries = [
        Entry(f"{one.variance:.2g}", f"q={one.rank}, K={one.k}", "best" if one is best else "")
        for one in lines
    ]
    return Entry(best.layer, f"{best.inputs} to {best.outputs}"), Entry(f"{best.own:.2g}"), *entries


def tuning_section(results: Results) -> Section:
    """Learning rates that were tried for dense."""
    title = "Learning rates tried for dense"
    rows = []
    for task in TASKS.values():
        trials = [one for one in results.trials if one.task == task.name]
        best = best_rate(task, trials)
        for lr in sorted({one.lr for one in trials}):
            mine = [one for one in trials if one.lr == lr]
            value = fmean(getattr(one, task.metric) for one in mine)
            used = "used" if lr == task.optimizer.lr else ""
            tone = "best" if lr == best else ""
            shown = number(task, value) if math.isfinite(value) else "diverged"
            rows.append((Entry(task.name), Entry(f"{lr:g}", used), Entry(shown, tone=tone)))
    if not rows:
        return Section("tuning", title, ["Not run yet."])
    caption = "Accuracy in %, or loss in nats, on a part of the training data; the best is marked."
    return Section(
        "tuning", title, [Table(("task", "rate", "mean"), tuple(rows), 2, caption=caption)]
    )
