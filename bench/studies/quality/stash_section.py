"""The section of the page on runs whose inputs are kept in four bits."""

from __future__ import annotations

from memaop_triton.bench.report import text
from memaop_triton.bench.report.document import NOTHING, Block, Section, Table
from memaop_triton.bench.report.document import Cell as Entry
from memaop_triton.bench.studies.quality.results import Results
from memaop_triton.bench.studies.quality.schemes import (
    AUTO,
    AUTO_STASH,
    RATIO,
    STASH,
    WHOLE,
    Cell,
)
from memaop_triton.bench.studies.quality.sections import entry_of
from memaop_triton.bench.studies.quality.statistics import paired
from memaop_triton.bench.studies.quality.tasks import TASKS, Task

INTRODUCTION = (
    'Runs with `stash="int4"`, at equal steps: of all rows beside dense, so that only rounding is '
    f"between them, at {RATIO} beside the same without a stash, and where the library decides."
)


def stash_section(results: Results) -> Section:
    """What rounding costs, task by task."""
    title = "Inputs in four bits"
    rows = [(Entry(name), *_row(results, task)) for name, task in TASKS.items()]
    known = tuple(row for row in rows if any(entry.text != NOTHING.text for entry in row[1:]))
    if not known:
        return Section("stash", title, ["Not run yet."])
    head = ("task", "all rows − dense", f"{RATIO} − {RATIO} without a stash", "auto − auto without")
    blocks: list[Block] = [INTRODUCTION, Table(head, known, 1, caption="What rounding changes.")]
    return Section("stash", title, blocks)


def _row(results: Results, task: Task) -> tuple[Entry, ...]:
    pairs = (
        (Cell(task.name, STASH, WHOLE), Cell(task.name, STASH, WHOLE).dense),
        (Cell(task.name, STASH, RATIO), Cell(task.name, "subspace", RATIO)),
        (Cell(task.name, AUTO_STASH, WHOLE), Cell(task.name, AUTO, WHOLE)),
    )
    return tuple(_difference(results, task, *pair) for pair in pairs)


def _difference(results: Results, task: Task, one: Cell, other: Cell) -> Entry:
    found = paired(results.metrics(one), results.metrics(other), task.sign)
    if found is None or results.diverged(one):
        return NOTHING
    return entry_of(task, found, text.count(found.pairs, "pair"))
