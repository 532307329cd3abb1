"""The sections of the page: an overview, a task each, and how to read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import TypeVar

from memaop_triton.bench.report import text
from memaop_triton.bench.report.document import NOTHING, Block, Chart, Section, Table
from memaop_triton.bench.report.document import Cell as Entry
from memaop_triton.bench.studies.quality import plots
from memaop_triton.bench.studies.quality.results import Results
from memaop_triton.bench.studies.quality.schemes import (
    ALL_RATIOS,
    DENSE,
    RATIO,
    RATIO_OF_BOTH,
    ROTATING,
    SCHEMES,
    SHORTER,
    SMALLER,
    WHOLE,
    Cell,
    cells,
)
from memaop_triton.bench.studies.quality.statistics import Difference
from memaop_triton.bench.studies.quality.tasks import TASKS, Task

R = TypeVar("R")

READING = (
    "Runs of a task with the same seed start from the same weights and see the same batches, but "
    "for those with a smaller one. A "
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
    """All schemes on all tasks, those with a cheaper dX too at a ratio of their own."""

    def table(cheapens_both: bool, ratio: str, caption: str) -> Table | str:
        names = [
            name
            for name, one in SCHEMES.items()
            if one.has_ratios and one.cheapens_both == cheapens_both
        ]
        return _table(
            _labelled(names),
            list(TASKS),
            lambda name, task: _difference(results, Cell(task, name, ratio)),
            caption,
        )

    blocks: list[Block] = [
        "Accuracy in points, more is better; loss of the GPTs in nats, less is better.",
        table(False, RATIO, f"Difference to dense at r = {RATIO}"),
        table(True, RATIO_OF_BOTH, f"dX cheaper too: difference to dense at {RATIO_OF_BOTH}"),
    ]
    return Section("overview", "At a glance", blocks)


def equal_time_section(results: Results) -> Section:
    """Where a cheaper step buys more than it loses."""
    timed = sorted(results.times, key=lambda cell: cell.place[1:])
    rows = {f"{SCHEMES[cell.scheme].label}, {cell.ratio}": cell[1:] for cell in timed}

    def table(kind: str, how: str) -> Table | str:
        return _table(
            rows,
            list(TASKS),
            lambda row, task: _at_equal_time(results, Cell(task, *row), kind),
            f"Difference to dense with {how} after the same seconds; below, a step's time over "
            "dense's.",
        )

    how = (
        "Dense was trained with fewer steps too, its learning rate coming down by then, and with "
        "fewer rows in as many steps; what it reaches in the time that a scheme takes is "
        "interpolated between these runs."
    )
    blocks: list[Block] = [how, table(SHORTER, "fewer steps"), table(SMALLER, "a smaller batch")]
    return Section("equal-time", "At equal time", blocks)


def _at_equal_time(results: Results, cell: Cell, kind: str) -> Entry:
    time = results.times.get(cell)
    difference = results.at_equal_time(cell, kind)
    if difference is None:
        return NOTHING if time is None else Entry("–", f"{time.share:.2f}× time")
    assert time is not None
    return entry_of(TASKS[cell.task], difference, f"{time.share:.2f}× time")


def _labelled(schemes: Iterable[str]) -> dict[str, str]:
    return {SCHEMES[name].label: name for name in schemes}


def _table(
    rows: Mapping[str, R],
    columns: Sequence[str],
    entry: Callable[[R, str], Entry],
    caption: str,
) -> Table | str:
    """A table without rows and columns that are still empty."""
    every = [
        (Entry(label), *(entry(row, column) for column in columns)) for label, row in rows.items()
    ]
    known = [row for row in every if any(one.text != NOTHING.text for one in row[1:])]
    if not known:
        return f"{caption.rstrip('.')}: not run yet."
    head = ("scheme", *columns)
    kept = [at for at, column in enumerate(zip(*known, strict=True))
            if at == 0 or any(one.text != NOTHING.text for one in column)]  # fmt: skip
    return Table(
        tuple(head[at] for at in kept),
        tuple(tuple(row[at] for at in kept) for row in known),
        caption=caption,
    )


def task_section(results: Results, task: Task) -> Section:
    """Differences, costs and pictures of one task."""
    dense = Cell(task.name, DENSE, WHOLE)
    values = list(results.metrics(dense).values())
    if not values:
        return Section(task.name, task.title, ["Not run yet."])
    spread = f", standard deviation {number(task, stdev(values))}" if len(values) > 1 else ""
    unit = " %" if task.metric == "accuracy" else ""
    blocks: list[Block] = [
        f"Dense: {number(task, fmean(values))}{unit}{spread}, "
        f"{text.count(len(values), 'seed')}, {text.count(task.steps, 'step')}, learning rate "
        f"{task.optimizer.lr:g}."
    ]
    others = [cell for cell in cells(task.name) if cell != dense]
    if any(cell in results.runs for cell in others):
        rows = _labelled(cell.scheme for cell in others)
        best = _best(results, others)

        def difference(name: str, ratio: str) -> Entry:
            cell = Cell(task.name, name, ratio)
            entry = _difference(results, cell)
            return replace(entry, tone="best") if cell in best else entry

        def cost(name: str, ratio: str) -> Entry:
            return _cost(results, Cell(task.name, name, ratio))

        what = "accuracy, points" if task.metric == "accuracy" else "validation loss, nats"
        blocks += [
            _table(rows, ALL_RATIOS, difference, f"Difference to dense in {what}."),
            _table(
                rows,
                ALL_RATIOS,
                cost,
                "FLOPs of the weight gradients over dense's; time of a step over dense's.",
            ),
            Chart(
                f"{task.title}: r = {RATIO}, mean over seeds",
                plots.curves(results, task),
                columns=1,
                file=f"{task.name}-curves.svg",
            ),
        ]
        if any(plots.has_cost(cell) and results.difference(cell) for cell in others):
            trade = Chart(
                f"{task.title}: what is lost for what is saved",
                plots.trade_off(results, task),
                columns=1,
                file=f"{task.name}-trade.svg",
            )
            blocks.append(trade)
    return Section(task.name, task.title, blocks)


def _difference(results: Results, cell: Cell) -> Entry:
    task, runs = TASKS[cell.task], results.runs.get(cell, {})
    diverged = results.diverged(cell)
    if diverged:
        return Entry(f"{diverged} of {len(runs)} diverged", tone="bad")
    difference = results.difference(cell)
    if difference is None:
        return NOTHING
    return entry_of(task, difference, f"{difference.better} of {difference.pairs} better")


def entry_of(task: Task, difference: Difference, sub: str = "") -> Entry:
    """A mean difference and its half-width."""
    mean = number(task, difference.mean, signed=True)
    if difference.pairs == 1:
        return Entry(f"{mean} ± ?", sub)
    clearly_worse = difference.is_clear and task.sign * difference.mean < 0
    tone = "bad" if clearly_worse else ""
    return Entry(f"{mean} ± {number(task, difference.half_width)}", sub, tone)


def _cost(results: Results, cell: Cell) -> Entry:
    run, time = results.any_run(cell), results.times.get(cell)
    if run is None and time is None:
        return NOTHING
    if cell.scheme == SHORTER:
        return Entry(f"{cell.ratio} of the steps")
    times = "not timed" if time is None else f"{time.share:.2f}× time"
    if cell.scheme == SMALLER:
        return Entry(f"{cell.ratio} of the rows", times)
    if cell.scheme == ROTATING:
        return Entry(f"{cell.ratio} of the layers", times)
    flops = "FLOPs ?" if run is None else f"{run.weight_grads:.3f}"
    return Entry(flops, times)


def _best(results: Results, cells: Iterable[Cell]) -> list[Cell]:
    """The scheme with the best mean at every ratio of a task, dense ones aside."""
    found: dict[str, tuple[float, Cell]] = {}
    for cell in cells:
        difference = results.difference(cell)
        if cell.config is None or difference is None:
            continue
        gain = TASKS[cell.task].sign * difference.mean
        if cell.ratio not in found or gain > found[cell.ratio][0]:
            found[cell.ratio] = gain, cell
    return [cell for _, cell in found.values()]


def number(task: Task, value: float, *, signed: bool = False) -> str:
    digits = 2 if task.metric == "accuracy" else 4
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")
