"""The sections of the page: a task each, the cross terms, learning rates, and how to read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean, stdev

from memaop_triton.bench.quality import plots
from memaop_triton.bench.quality.crossterms import CrossTerms
from memaop_triton.bench.quality.results import Results, root_mean_square
from memaop_triton.bench.quality.schemes import (
    ALL_RATIOS,
    DENSE,
    RATIO,
    RATIO_OF_BOTH,
    SCHEMES,
    SHORTER,
    WHOLE,
    Cell,
    cells,
)
from memaop_triton.bench.quality.tasks import TASKS, Task
from memaop_triton.bench.quality.tuning import best_rate
from memaop_triton.bench.report import text
from memaop_triton.bench.report.blocks import (
    NOTHING,
    Block,
    Bullets,
    Picture,
    Section,
    Table,
)
from memaop_triton.bench.report.blocks import (
    Cell as Entry,
)

READING = (
    "Runs of a task with the same seed start from the same weights and see the same batches. A "
    "difference is scheme − dense of such pairs: its mean ± half of a 95 % interval by Student's t "
    "(n − 1 degrees of freedom, normal differences assumed). Below stands in how many pairs the "
    "scheme did better. Nothing is corrected for the number of cells that are compared.",
    "A loss that is not finite ends a run; the cell then says how many of its runs diverged and "
    "shows no mean.",
    "The learning rate was tuned for dense, on a part of the training data, and kept for all "
    "schemes. The held-out data was not used for any choice.",
    "The output layer stays dense in every scheme. FLOPs are those of matrix products, counted "
    "while a step runs; those of weight gradients cover all linear layers, the output layer, the "
    "subspace and its refreshes included. Scoring and selecting rows is not in the FLOPs; it is in "
    "the times.",
    "Seconds are steps times the median step, measured apart on a machine that did nothing else, "
    "in turns with dense. The runs themselves may have shared their machine.",
    "Curves are on a fixed sample of the held-out data, tables on all of it.",
)


def overview_section(results: Results) -> Section:
    """All schemes on all tasks, those that sample dX too at a ratio of their own."""
    units = "Accuracy in points, more is better; loss of the GPTs in nats, less is better."
    only = [name for name, one in SCHEMES.items() if one.make and not one.samples_both]
    both = [name for name, one in SCHEMES.items() if one.samples_both]
    blocks: list[Block] = [
        units,
        _overview(results, only, RATIO, f"Difference to dense at r = {RATIO}"),
        _overview(
            results, both, RATIO_OF_BOTH, f"dX sampled too: difference to dense at {RATIO_OF_BOTH}"
        ),
    ]
    return Section("overview", "At a glance", blocks)


def _overview(results: Results, names: Sequence[str], ratio: str, caption: str) -> Table:
    rows = [
        (
            Entry(SCHEMES[name].label),
            *(_difference(results, Cell(task, name, ratio)) for task in TASKS),
        )
        for name in names
    ]
    return Table(("scheme", *TASKS), tuple(rows), caption=caption)


def task_section(results: Results, task: Task) -> Section:
    """Differences, costs and pictures of one task."""
    dense = Cell(task.name, DENSE, WHOLE)
    values = list(results.metrics(dense).values())
    if not values:
        return Section(task.name, task.title, ["Not run yet."])
    spread = f", standard deviation {_number(task, stdev(values))}" if len(values) > 1 else ""
    unit = " %" if task.metric == "accuracy" else ""
    blocks: list[Block] = [
        f"Dense: {_number(task, fmean(values))}{unit}{spread}, "
        f"{text.count(len(values), 'seed')}, {text.count(task.steps, 'step')}, learning rate "
        f"{task.optimizer.lr:g}."
    ]
    if any(cell in results.runs for cell in cells(task.name) if cell != dense):
        what = "accuracy, points" if task.metric == "accuracy" else "validation loss, nats"
        blocks += [
            _table(
                task,
                partial(_difference, results),
                f"Difference to dense in {what}.",
                best=_best(results, task),
            ),
            _table(
                task,
                partial(_cost, results),
                "FLOPs of the weight gradients over dense's; time of a step over dense's.",
            ),
            _picture(f"{task.title}: r = {RATIO}, mean over seeds", f"{task.name}-curves",
                     plots.curves(results, task)),
            _picture(f"{task.title}: what is lost for what is saved", f"{task.name}-trade",
                     plots.trade_off(results, task)),
        ]  # fmt: skip
    return Section(task.name, task.title, blocks)


def _picture(title: str, name: str, svg: str) -> Picture:
    return Picture(title, svg, f"{name}.svg")


def _table(
    task: Task, entry: Callable[[Cell], Entry], caption: str, *, best: Sequence[Cell] = ()
) -> Table:
    every = [cell for cell in cells(task.name) if cell.scheme != DENSE]
    ratios = [ratio for ratio in ALL_RATIOS if any(cell.ratio == ratio for cell in every)]
    rows = []
    for name in dict.fromkeys(cell.scheme for cell in every):
        row = [entry(Cell(task.name, name, ratio)) for ratio in ratios]
        marked = [
            replace(one, tone="best") if Cell(task.name, name, ratio) in best else one
            for one, ratio in zip(row, ratios, strict=True)
        ]
        rows.append((Entry(SCHEMES[name].label), *marked))
    return Table(("scheme", *ratios), tuple(rows), caption=caption)


def _difference(results: Results, cell: Cell) -> Entry:
    task, runs = TASKS[cell.task], results.runs.get(cell, {})
    diverged = results.diverged(cell)
    if diverged:
        return Entry(f"{diverged} of {len(runs)} diverged", tone="bad")
    difference = results.difference(cell)
    if difference is None:
        return NOTHING
    sub = f"{difference.better} of {difference.pairs} better"
    mean = _number(task, difference.mean, signed=True)
    if difference.pairs == 1:
        return Entry(f"{mean} ± ?", sub)
    clearly_worse = difference.is_clear and task.sign * difference.mean < 0
    tone = "bad" if clearly_worse else ""
    return Entry(f"{mean} ± {_number(task, difference.half_width)}", sub, tone)


def _cost(results: Results, cell: Cell) -> Entry:
    run, time = results.any_run(cell), results.times.get(cell)
    if cell.scheme == SHORTER:
        return Entry(f"{cell.ratio} of the steps")
    if run is None and time is None:
        return NOTHING
    flops = "FLOPs ?" if run is None else f"{run.weight_grads:.3f}"
    return Entry(flops, "not timed" if time is None else f"{time.share:.2f}× time")


def _best(results: Results, task: Task) -> list[Cell]:
    """The scheme with the best mean at every ratio."""
    found: dict[str, tuple[float, Cell]] = {}
    for cell in cells(task.name):
        difference = results.difference(cell)
        if cell.config is None or difference is None:
            continue
        gain = task.sign * difference.mean
        if cell.ratio not in found or gain > found[cell.ratio][0]:
            found[cell.ratio] = gain, cell
    return [cell for _, cell in found.values()]


def _number(task: Task, value: float, *, signed: bool = False) -> str:
    digits = 2 if task.metric == "accuracy" else 4
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


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
        "inflate S the more the smaller K/M is; random signs leave them no mean. *cross* is their "
        "norm over D's, *unexplained* what is left of S − D once they and the rows still held back "
        "are taken away, summed from the batches by the slots' ages. *predicted* is ‖S‖/‖D‖ from "
        "K/M, T and the moments of X and G alone.".replace("*", "`"),
    ]
    for task, ratio in dict.fromkeys((one.task, one.ratio) for one in lines):
        last = max(one.batches for one in lines if (one.task, one.ratio) == (task, ratio))
        mine = [one for one in lines if (one.task, one.ratio, one.batches) == (task, ratio, last)]
        name = f"{TASKS[task].title}, r = {text.ratio(ratio)}, T = {last}"
        blocks.append(_cross_terms_table(mine, f"{name}: mean over layers, least and most below."))
        file = f"{task}-crossterms-{round(1 / ratio)}"
        title_of_picture = f"{name}: a line per layer; dashed what was predicted"
        blocks.append(_picture(title_of_picture, file, plots.cross_terms(results, task, ratio)))
    return Section("cross-terms", title, blocks)


def _cross_terms_table(lines: Sequence[CrossTerms], caption: str) -> Table:
    columns = ("norm", "predicted", "cosine", "error", "cross", "unexplained")
    rows = []
    for method in dict.fromkeys((one.selection, one.memory) for one in lines):
        mine = [one for one in lines if (one.selection, one.memory) == method]
        entries = [_over_layers(mine, column) for column in columns]
        rows.append((Entry(" + ".join(method)), *entries))
    head = ("method", "‖S‖/‖D‖", "predicted", "cosine", "‖S−D‖/‖D‖", "cross", "unexplained")
    return Table(head, tuple(rows), caption=caption)


def _over_layers(lines: Sequence[CrossTerms], column: str) -> Entry:
    by_layer: dict[str, list[float]] = {}
    for one in lines:
        by_layer.setdefault(one.layer, []).append(getattr(one, column))
    average = fmean if column == "cosine" else root_mean_square
    values = [average(one) for one in by_layer.values()]
    if math.isnan(values[0]):
        return NOTHING
    return Entry(f"{fmean(values):.3g}", f"{min(values):.3g} to {max(values):.3g}")


def tuning_section(results: Results) -> Section:
    """Learning rates that were tried for dense."""
    title = "Learning rates tried for dense"
    rows = []
    for task in TASKS.values():
        trials = [one for one in results.trials if one.task == task.name]
        best = best_rate(task, trials)
        for lr in sorted({one.lr for one in trials}):
            mine = [one for one in trials if one.lr == lr]
            value = fmean(one.accuracy if task.metric == "accuracy" else one.loss for one in mine)
            used = "used" if lr == task.optimizer.lr else ""
            tone = "best" if lr == best else ""
            shown = _number(task, value) if math.isfinite(value) else "diverged"
            rows.append((Entry(task.name), Entry(f"{lr:g}", used), Entry(shown, tone=tone)))
    if not rows:
        return Section("tuning", title, ["Not run yet."])
    caption = "Accuracy in %, or loss in nats, on a part of the training data; the best is marked."
    return Section(
        "tuning", title, [Table(("task", "rate", "mean"), tuple(rows), 2, caption=caption)]
    )


def reading_section() -> Section:
    """How the numbers were made."""
    return Section("reading", "How to read this", [Bullets(READING, shown=len(READING))])
