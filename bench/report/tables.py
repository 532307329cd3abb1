"""The tables of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from memaop_triton.bench.report import text
from memaop_triton.bench.report.analysis import Models, Row, overhead
from memaop_triton.bench.report.compare import NOTABLE_PERCENT, Comparison
from memaop_triton.bench.report.data import Case, Method
from memaop_triton.bench.report.document import NOTHING, Cell, Table
from memaop_triton.bench.report.findings import WANTED_SHARE
from memaop_triton.bench.report.fits import Power, TimeModel
from memaop_triton.bench.report.methods import definition, methods_of


def speedups(found: Sequence[Row]) -> Table:
    """Shapes and ratios down, methods across; the fastest of a row is marked."""
    methods = methods_of([case for row in found for case, _ in row.found.values()])
    sides = [sum(one.role == role for one in methods) for role in ("ours", "baseline")]
    lines = []
    for row in found:
        best = max((one.speedup.median for one in row.methods), default=0.0)
        cells = [_speed(row.found.get(one.name), best) for one in methods]
        lines.append((*_names(row.case), _dense(row), *cells))
    groups = [("", 3), ("ours", sides[0]), ("baselines", sides[1])]
    return Table(
        ("M × N × P", "r", "dense", *(one.name for one in methods)),
        tuple(lines),
        names=2,
        caption="Speed-up over dense, median; below it the quartiles. Bold: the fastest.",
        groups=tuple(group for group in groups if group[1]),
    )


def _speed(found: tuple[Case, Method] | None, best: float) -> Cell:
    if found is None:
        return NOTHING
    speed = found[1].speedup
    tone = "best" if speed.median == best else "bad" if speed.median < 1 else ""
    return Cell(text.times(speed.median), text.span(speed.q1, speed.q3), tone)


def _names(case: Case) -> tuple[Cell, Cell]:
    return Cell(case.shape, ", ".join(case.unusual)), Cell(text.ratio(case.ratio))


def _dense(row: Row) -> Cell:
    dense = row.case.dense
    return NOTHING if dense is None else Cell(text.duration(dense.ms.median))


def limits(found: Sequence[Row]) -> Table | None:
    """Share of the limit per call of ours; `None` if no limit was measured."""

    def cell(row: Row, name: str) -> Cell:
        share = row.share_of_limit(name)
        if share is None:
            return NOTHING
        case, method = row.found[name]
        limit = case.limit_for(name)
        took = text.duration(method.ms.median)
        of = "" if limit is None else text.duration(limit.ms.median)
        return Cell(text.percent(share), f"{of} / {took}", "bad" if share < WANTED_SHARE else "")

    return _matrix(found, cell, ("ours",), "Share of the limit; below it the limit's time / ours.")


def cold(found: Sequence[Row]) -> Table | None:
    """Speed-ups with cold caches; `None` if they were not measured."""

    def cell(row: Row, name: str) -> Cell:
        speed = row.found[name][1].cold
        if speed is None:
            return NOTHING
        return Cell(text.times(speed.median), text.span(speed.q1, speed.q3))

    caption = "Speed-up over dense if every call finds cold caches."
    return _matrix(found, cell, ("ours", "baseline"), caption, "Cold caches")


def peaks(found: Sequence[Row]) -> Table | None:
    """Peak memory of a call; `None` if it was not measured."""

    def cell(row: Row, name: str) -> Cell:
        peak = row.found[name][1].peak_bytes
        return NOTHING if peak is None else Cell(text.size(peak))

    caption = "Memory that a call holds at most, besides its operands."
    return _matrix(found, cell, ("ours", "baseline"), caption, "Peak memory")


def _matrix(
    found: Sequence[Row],
    cell: Callable[[Row, str], Cell],
    roles: Sequence[str],
    caption: str,
    folded: str = "",
) -> Table | None:
    methods = methods_of([case for row in found for case, _ in row.found.values()], roles)
    lines = []
    for row in found:
        cells = [cell(row, m.name) if m.name in row.found else NOTHING for m in methods]
        if any(one is not NOTHING for one in cells):
            lines.append((*_names(row.case), *cells))
    if not lines:
        return None
    head = ("M × N × P", "r", *(one.name for one in methods))
    return Table(head, tuple(lines), names=2, caption=caption, folded=folded)


def steps(cases: Sequence[Case]) -> Table:
    """One line per case and method: layers, steps, kernels."""
    lines = []
    for case in cases:
        dense = NOTHING if case.dense is None else Cell(text.duration(case.dense.ms.median))
        for method in methods_of([case]):
            wanted = case.wanted.get(method.name)
            speed = method.speedup
            short = wanted is not None and speed.median < wanted
            tone = "bad" if speed.median < 1 or short else ""
            lines.append(
                (
                    Cell(case.title),
                    Cell(method.name, method.label if case.kind == "kernel" else ""),
                    dense,
                    Cell(text.duration(method.ms.median)),
                    Cell(text.times(speed.median), text.span(speed.q1, speed.q3), tone),
                    NOTHING if wanted is None else Cell(text.times(wanted)),
                )
            )
    head = ("case", "method", "dense", "time", "speed-up", "wanted")
    return Table(head, tuple(lines), names=2)


def overheads(cases: Sequence[Case]) -> Table:
    """Microseconds of the smallest calls and what is beyond dense's."""
    lines = []
    for case in cases:
        for method in methods_of([case], ("dense", "ours", "baseline")):
            beyond = NOTHING if method.role == "dense" else Cell(_beyond(case, method))
            shape = Cell(case.shape), Cell(text.ratio(case.ratio)), Cell(method.name)
            lines.append((*shape, Cell(text.duration(method.ms.median)), beyond))
    return Table(("M × N × P", "r", "method", "call", "beyond dense"), tuple(lines), names=3)


def _beyond(case: Case, method: Method) -> str:
    return text.duration(overhead(case, method))


def exponents(fits: dict[str, Power | None], methods: Sequence[Method]) -> Table:
    """The fitted growth of every method."""
    lines = []
    for method in methods:
        fit = fits[method.name]
        if fit is None:
            lines.append((Cell(method.name), *[NOTHING] * 4, Cell("one size: no fit")))
            continue
        error = Cell(f"{fit.error:.3f}") if fit.points > 2 else Cell("–", "two sizes")
        exponent = Cell(f"{fit.exponent:.3f}")
        fixed = Cell(text.duration(fit.fixed)) if fit.fixed else NOTHING
        numbers = (fixed, exponent, error, Cell(f"{fit.points}"))
        lines.append((Cell(method.name), *numbers, Cell(fit.growth)))
    head = ("method", "fixed", "exponent", "standard error", "sizes", "growth")
    caption = "Time = fixed + scale · M^exponent, by least squares in logarithms."
    return Table(head, tuple(lines), caption=caption)


def time_models(models: Models, item_size: int | None) -> Table:
    """The fitted terms, as rates, and how far the fit is from what was measured."""
    lines = [_model("dense", models.dense, item_size)]
    lines += [_model(f"`{name}`", model, item_size) for name, model in models.ours.items()]
    head = ("method", "fixed", "M(N+P) term", "K·N·P term", "calls", "median error", "worst")
    return Table(head, tuple(lines), folded="The fitted models")


def _model(name: str, model: TimeModel | None, item_size: int | None) -> tuple[Cell, ...]:
    if model is None:
        return Cell(name), Cell("no fit", "too few shapes"), *(NOTHING,) * 5
    passing, product = model.per_element, model.per_product
    return (
        Cell(name),
        Cell(text.duration(model.fixed)),
        Cell(f"{item_size / passing / 1e6:.3g} GB/s" if passing and item_size else "–"),
        Cell(f"{2 / product / 1e6:.3g} GFLOP/s" if product else "–"),
        Cell(f"{model.points}"),
        Cell(text.percent(model.median_error), tone="" if model.good else "bad"),
        Cell(text.percent(model.worst_error)),
    )


def changes(comparison: Comparison) -> Table:
    """Every call that both runs have, the largest loss first."""
    same = comparison.same_machine
    lines = []
    for change in comparison.changes:
        old, new = change.old.speedup, change.new.speedup
        tone = "bad" if change.slower_by(NOTABLE_PERCENT) else ""
        spread = "" if change.apart else "in the spread"
        line = [
            Cell(change.case.title),
            Cell(change.new.name),
            Cell(text.times(old.median), text.span(old.q1, old.q3)),
            Cell(text.times(new.median), text.span(new.q1, new.q3)),
            Cell(f"{100 * (change.ratio - 1):+.1f} %", spread, tone),
        ]
        if same:
            time = change.new.ms.median / change.old.ms.median
            line.append(Cell(f"{100 * (time - 1):+.1f} %"))
        lines.append(tuple(line))
    head: tuple[str, ...] = ("case", "method", "earlier", "now", "speed-up changed by")
    if same:
        head = (*head, "time changed by")
    return Table(head, tuple(lines), names=2, folded="Every call, the largest loss first")


def definitions(methods: Sequence[Method]) -> Table:
    """What every method is."""
    lines = []
    for method in methods:
        what = definition(method)
        unbiased = "–" if what is None else "yes" if what.unbiased else "no"
        about = method.label if what is None else what.text
        if what is not None and "sampled dX" in method.name:
            about += " The input gradient comes from K rows too."
        if what is not None and "projected dX" in method.name:
            about += " The input gradient's rows lie in a subspace, for r of dense's FLOPs."
            unbiased = "no"
        # The column says so already.
        note = "" if method.note == "biased" else method.note or ""
        lines.append((Cell(method.name), Cell(unbiased), Cell(about, note)))
    return Table(("method", "unbiased", "what it is"), tuple(lines), names=3, prose=True)
