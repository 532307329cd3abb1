"""The tables of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from memaop_triton.bench.report import text
from memaop_triton.bench.report.analysis import Power, Row, overhead, share_of_limit
from memaop_triton.bench.report.data import Case, Method, Spread
from memaop_triton.bench.report.document import NOTHING, Cell, Table
from memaop_triton.bench.report.findings import WANTED_SHARE
from memaop_triton.bench.report.methods import definition, methods_of
from memaop_triton.monitor.units import human_bytes


def speedups(found: Sequence[Row]) -> Table:
    """Shapes and ratios down, methods across; the fastest of a row is marked."""
    methods = methods_of([case for row in found for case, _ in row.found.values()])
    sides = [sum(one.role == role for one in methods) for role in ("ours", "baseline")]
    lines = []
    for row in found:
        best = max((one.speedup.median for one in row.methods), default=0.0)
        dense = Cell(text.duration(row.case.dense.ms.median))
        cells = [_speed(row.found.get(one.name), best) for one in methods]
        lines.append((*_names(row.case), dense, *cells))
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
    return _spread(speed, tone)


def _spread(speed: Spread, tone: str = "") -> Cell:
    return Cell(text.times(speed.median), text.span(speed.q1, speed.q3), tone)


def _names(case: Case) -> tuple[Cell, Cell]:
    return Cell(case.shape, ", ".join(case.unusual)), Cell(text.ratio(case.ratio))


def limits(found: Sequence[Row]) -> Table | None:
    """Share of the limit per call of ours; `None` if no limit was measured."""

    def cell(case: Case, method: Method) -> Cell:
        share = share_of_limit(case, method)
        if share is None or case.limit is None:
            return NOTHING
        times = f"{text.duration(case.limit.ms.median)} / {text.duration(method.ms.median)}"
        return Cell(text.percent(share), times, "bad" if share < WANTED_SHARE else "")

    return _matrix(found, cell, ("ours",), "Share of the limit; below it the limit's time / ours.")


def cold(found: Sequence[Row]) -> Table | None:
    """Speed-ups with cold caches; `None` if they were not measured."""

    def cell(case: Case, method: Method) -> Cell:
        return NOTHING if method.cold is None else _spread(method.cold)

    caption = "Speed-up over dense if every call finds cold caches."
    return _matrix(found, cell, ("ours", "baseline"), caption, "Cold caches")


def peaks(found: Sequence[Row]) -> Table | None:
    """Peak memory of a call."""

    def cell(case: Case, method: Method) -> Cell:
        return Cell(human_bytes(method.peak_bytes))

    caption = "Memory that a call holds at most, besides its operands."
    return _matrix(found, cell, ("ours", "baseline"), caption, "Peak memory")


def _matrix(
    found: Sequence[Row],
    cell: Callable[[Case, Method], Cell],
    roles: Sequence[str],
    caption: str,
    folded: str = "",
) -> Table | None:
    methods = methods_of([case for row in found for case, _ in row.found.values()], roles)
    lines = []
    for row in found:
        cells = [cell(*row.found[m.name]) if m.name in row.found else NOTHING for m in methods]
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
        dense = Cell(text.duration(case.dense.ms.median))
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
                    _spread(speed, tone),
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
            beyond = NOTHING
            if method.role != "dense":
                beyond = Cell(text.duration(overhead(case, method)))
            shape = Cell(case.shape), Cell(text.ratio(case.ratio)), Cell(method.name)
            lines.append((*shape, Cell(text.duration(method.ms.median)), beyond))
    return Table(("M × N × P", "r", "method", "call", "beyond dense"), tuple(lines), names=3)


def exponents(fits: dict[str, Power | None], methods: Sequence[Method]) -> Table:
    """The fitted growth of every method."""
    lines = []
    for method in methods:
        fit = fits[method.name]
        if fit is None:
            lines.append((Cell(method.name), *[NOTHING] * 4, Cell("too few sizes")))
            continue
        cells = (
            text.duration(fit.fixed),
            f"{fit.exponent:.3f}",
            f"{fit.error:.3f}",
            f"{fit.sizes}",
            fit.growth,
        )
        lines.append((Cell(method.name), *map(Cell, cells)))
    head = ("method", "fixed", "exponent", "standard error", "sizes", "growth")
    caption = "Time = fixed + scale · M^exponent, by least squares in logarithms."
    return Table(head, tuple(lines), caption=caption)


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
        lines.append((Cell(method.name), Cell(unbiased), Cell(about)))
    return Table(("method", "unbiased", "what it is"), tuple(lines), names=3, prose=True)
