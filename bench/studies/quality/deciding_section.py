"""The section of the page on runs in which the library decides."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from memaop_triton.bench.report import text
from memaop_triton.bench.report.document import NOTHING, Block, Section, Table
from memaop_triton.bench.report.document import Cell as Entry
from memaop_triton.bench.studies.quality import progress
from memaop_triton.bench.studies.quality.results import Results
from memaop_triton.bench.studies.quality.schemes import (
    AUTO,
    DENSE,
    SHORTER,
    SMALLER,
    WHOLE,
    Cell,
    cells,
)
from memaop_triton.bench.studies.quality.sections import entry_of
from memaop_triton.bench.studies.quality.statistics import Difference
from memaop_triton.bench.studies.quality.tasks import TASKS, Task

#: By which auto may be worse than dense at equal seconds, at the worse end of the interval.
ALLOWED = {"loss": 0.01, "accuracy": 0.2}
#: Time to dense's loss over that of the best fixed choice.
ALLOWED_TIME = 1.05

INTRODUCTION = (
    'Runs with `ratio="auto"`, alone on the machine. `time` is that of a run\'s steps, decisions '
    "included, over as many dense steps, which were timed in bursts all along the run. The "
    "differences are to dense in these seconds, by fewer steps or by a smaller batch, interpolated "
    "between such runs of dense; where auto took longer than dense, dense's curve is continued in "
    "a straight line, which is in favour of dense. `decided` is the worse end of the 95 % interval "
    f"against fewer steps within {ALLOWED['loss']:g} nats or {ALLOWED['accuracy']:g} points.",
    "`time to dense's loss` is time over measured progress: of auto, and of the best of dense and "
    "`allocate_` with a given budget.",
)


def deciding_section(results: Results) -> Section:
    """Auto beside dense at equal seconds, task by task."""
    title = "The library decides"
    rows = [_row(results, task) for task in TASKS.values() if task.name in results.decided]
    if not rows:
        return Section("decided", title, ["Not run yet."])
    head = (
        "task",
        "time",
        "fewer steps",
        "smaller batch",
        "decided",
        "predicted, realised",
        "time to dense's loss",
    )
    caption = "Difference of auto to dense at equal seconds, and what was decided."
    blocks: list[Block] = [
        *INTRODUCTION,
        _machines(results),
        Table(head, tuple(rows), 1, caption=caption),
    ]
    return Section("decided", title, blocks)


def _machines(results: Results) -> str:
    """Where runs took place: what is gained hangs on it."""
    seeds: dict[tuple[str, int], dict[str, list[int]]] = {}
    for task, lines in results.decided.items():
        for seed, line in sorted(lines.items()):
            of_machine = seeds.setdefault((line.cpu, line.threads), {})
            of_machine.setdefault(task, []).append(seed)
    most = max(seeds, key=lambda machine: sum(map(len, seeds[machine].values())))
    said = [f"On {most[0]} with {text.count(most[1], 'thread')}"]
    for machine in sorted(seeds.keys() - {most}):
        runs = (f"{task} {_listed(of)}" for task, of in seeds[machine].items())
        said.append(f"on {machine[0]} with {text.count(machine[1], 'thread')} {', '.join(runs)}")
    return "; ".join(said) + "."


def _listed(seeds: Sequence[int]) -> str:
    return f"(seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})"


def _row(results: Results, task: Task) -> tuple[Entry, ...]:
    lines = list(results.decided[task.name].values())
    share = fmean(one.share for one in lines)
    sampled = fmean(one.sampled / one.steps for one in lines)
    differences = [results.auto_at_equal_time(task.name, kind) for kind in (SHORTER, SMALLER)]
    tried = [one.realised for one in lines if one.realised]
    realised = f"{fmean(tried):.2f}" if tried else "–"
    return (
        Entry(task.name, text.count(len(lines), "seed")),
        Entry(f"{share:.3f}", f"{100 * sampled:.0f} % of steps sampled"),
        *(NOTHING if one is None else entry_of(task, one) for one in differences),
        _verdict(task, differences[0]),
        Entry(f"{fmean(one.predicted for one in lines):.2f}, {realised}"),
        _times(results, task, share),
    )


def _verdict(task: Task, difference: Difference | None) -> Entry:
    if difference is None or difference.pairs == 1:
        return Entry("undecided", "one pair" if difference else "no rival")
    gain, allowed = task.sign * difference.mean, ALLOWED[task.metric]
    if gain > difference.half_width:
        return Entry("ahead", tone="best")
    if gain - difference.half_width >= -allowed:
        return Entry("no worse")
    return Entry("worse", tone="bad") if gain + difference.half_width < 0 else Entry("undecided")


def _times(results: Results, task: Task, share: float) -> Entry:
    """Auto's time to dense's loss over dense's, and that of the best fixed choice."""
    made = progress.progress_at_end(results, Cell(task.name, AUTO, WHOLE))
    if not made:
        return NOTHING
    own = share / fmean(made)
    others = {DENSE: 1.0}
    for cell in cells(task.name):
        made = progress.progress_at_end(results, cell)
        if cell.scheme == "budget-allocated" and cell in results.times and made:
            others[f"{cell.ratio} allocated"] = results.times[cell].share / fmean(made)
    best = min(others, key=others.__getitem__)
    ratio = own / others[best]
    tone = "" if ratio <= ALLOWED_TIME else "bad"
    return Entry(f"{own:.2f}", f"{ratio:.2f} of the best, {best}", tone)
