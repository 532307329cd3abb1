"""A run as sections, in the order of the page; a section without numbers is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from memaop_triton.bench.report import tables, text
from memaop_triton.bench.report.analysis import grouped, headline, rows
from memaop_triton.bench.report.charts import bars, roofline
from memaop_triton.bench.report.data import Run
from memaop_triton.bench.report.document import (
    Bullets,
    Chart,
    Code,
    Document,
    Section,
    Subheading,
)
from memaop_triton.bench.report.findings import Miss, by_place, findings
from memaop_triton.bench.report.memory import memory
from memaop_triton.bench.report.methods import methods_of
from memaop_triton.bench.report.sweeps import (
    against_ratio,
    against_rows,
    against_width,
    break_even,
)


def document(run: Run) -> Document:
    """Put a report together."""
    sections = _sections(run)
    absent = ", ".join(section.title for section in sections if not section.blocks)
    name = run.machine.name if run.machine else "an unnamed machine"
    calls = sum(len(case.methods) for case in run.cases)
    summary = (
        f"{text.count(len(run.cases), 'case')}, {text.count(calls, 'timed call')}. Every time is "
        "the median of rounds in which all methods of a case take turns; every speed-up is dense's "
        "time over the method's in the same round, with its quartiles."
    )
    return Document(
        "Performance report",
        f"memaop-triton on {name}",
        summary,
        tuple(_facts(run)),
        f"Not measured in this run: {absent}." if absent else "",
        tuple(section for section in sections if section.blocks),
        tuple(headline(run)),
        "times of steps" if _is_of_memory(run) else "roofline, curves, maps",
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    facts = [("suite", run.name), ("date", run.date[:16].replace("T", " "))]
    if run.commit:
        facts.append(("commit", run.commit[:10]))
    machine = run.machine
    if machine is None:
        return facts
    rates = (f"{text.rate(one, 'FLOP')} {dtype}" for dtype, one in machine.gemm_gflops.items())
    read, update = text.rate(machine.stream_gbs, "B"), text.rate(machine.triad_gbs, "B")
    facts += [
        ("machine", machine.name),
        ("threads", f"{machine.threads} on {text.count(machine.cores, 'core')}"),
        ("GEMM", ", ".join(rates)),
        ("memory", f"{read} read, {update} update"),
        ("caches", _joined(machine.caches)),
        ("versions", _joined(machine.versions)),
    ]
    if machine.clocks:
        facts.append(("clocks", machine.clocks))
    if machine.load_before is not None:
        facts.append(("load before", f"{machine.load_before:g}"))
    return facts


def _joined(values: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value)


def _sections(run: Run) -> list[Section]:
    """Every section; those that the run has no numbers for are empty.

    Memory has a suite of its own, so it is missing in no other, and nothing is missing in that.
    """
    held = [memory(run)] if run.of_kind("memory") else []
    if _is_of_memory(run):
        return [*held, _method(run)]
    return [
        _findings(run),
        _weight_grad(run),
        _roofline(run),
        against_ratio(run),
        against_width(run),
        break_even(run),
        against_rows(run),
        _steps(run),
        *held,
        _kernels(run),
        _overhead(run),
        _method(run),
    ]


def _findings(run: Run) -> Section:
    checks = findings(run)
    lost = any(finding.misses for finding in checks)
    section = Section("losses", "Where it does not win" if lost else "Where it wins")
    for finding in checks:
        if finding.misses:
            share = f"{len(finding.misses)} of {text.count(finding.checked, 'call')}"
            section.blocks.append(Subheading(f"{share}: {finding.claim}"))
            bullets = Bullets(tuple(map(_miss, by_place(finding.misses))), 4)
            if len(bullets.items) > bullets.shown:
                counts = Counter(miss.method for miss in finding.misses)
                tally = (f"`{name}` {count}" for name, count in counts.most_common())
                section.blocks.append(f"By method: {', '.join(tally)}.")
            section.blocks.append(bullets)
    kept = [finding.opposite for finding in checks if not finding.misses]
    if kept:
        section.blocks.append(" ".join(kept))
    return section


def _miss(group: Sequence[Miss]) -> str:
    """One line for the methods that fail at one place for one cause, with the worst one's words."""
    worst = group[0]
    methods = ", ".join(f"`{miss.method}` {miss.what}" for miss in group)
    beside = f"; {worst.beside}" if worst.beside else ""
    why = f" – {worst.why.text}" if worst.why.text else ""
    return f"{worst.where}: {methods}{beside}{why}"


def _weight_grad(run: Run) -> Section:
    section = Section("weight-gradient", "One weight gradient")
    found = rows(run.of_kind("dw"))
    if found:
        section.blocks.append(
            "dW = Gᵀ X with scores, selection and memory, from K = r·M of M rows, "
            "beside the dense product of all."
        )
        tables_ = (
            tables.speedups(found),
            tables.limits(found),
            tables.cold(found),
            tables.peaks(found),
        )
        section.blocks.extend(table for table in tables_ if table is not None)
    return section


def _roofline(run: Run) -> Section:
    section = Section("roofline", "What the machine allows")
    machine = run.machine
    if machine is None:
        return section
    cases = [case for case in run.of_kind("dw") if case.dtype in machine.gemm_gflops]
    for some in grouped(cases, lambda case: case.dtype):
        title = f"Roofline, {some[0].dtype}"
        section.blocks.append(Chart(title, roofline(some, machine)))
    if cases:
        section.blocks.append(
            "A mark is one call: useful FLOPs (K rows, and the subspace's products) against the "
            "bytes it has to move – X and G once, a memory's reads and writes, and the GEMM's "
            "operands. Under a roof the pass over all rows and the GEMM would overlap; they run "
            "one after the other, so a call of ours stays below it even at its limit."
        )
    return section


def _steps(run: Run) -> Section:
    section = Section("steps", "Whole layers and training steps")
    for kind, title in (("layer", "Forward and backward of a layer"), ("step", "Training step")):
        cases = run.of_kind(kind)
        if cases:
            section.blocks.append(Chart(title, bars(cases)))
    cases = run.of_kind("layer", "step")
    if cases:
        if any(case.wanted for case in cases):
            section.blocks.append(
                "Whiskers span the quartiles; an upright tick is what was wanted."
            )
        section.blocks.append(tables.steps(cases))
    return section


def _kernels(run: Run) -> Section:
    section = Section("kernels", "Kernels")
    if run.of_kind("kernel"):
        section.blocks.append(tables.steps(run.of_kind("kernel")))
    return section


def _overhead(run: Run) -> Section:
    section = Section("overhead", "Overhead of a call")
    if run.of_kind("overhead"):
        section.blocks.append("Where the arithmetic is next to nothing, what is left is overhead.")
        section.blocks.append(tables.overheads(run.of_kind("overhead")))
    return section


def _is_of_memory(run: Run) -> bool:
    return len(run.of_kind("memory")) == len(run.cases)


def _method(run: Run) -> Section:
    suite = run.name if run.name in ("quick", "cpu", "gpu", "memory") else _suite(run)
    limit = (
        "The limit is what no method with the same traffic can beat: a GEMM of K rows that lie "
        "together, plus one pass over X and G. A row memory is read, updated and written in "
        "that pass; a subspace adds the rows that its 2·M·q·(N+P) FLOPs would pay for. It is "
        "measured in the same rounds."
    )
    return Section(
        "method",
        "How it was measured, and how to repeat it",
        [
            Code(f"memaop-triton bench --suite {suite} --output results"),
            "All methods of a case run in turn, round after round, in one process. A speed-up is "
            "dense's time over the method's in the same round, so that a machine that slows down "
            "slows both; shown are the median of the rounds and the quartiles.",
            *([] if _is_of_memory(run) else [limit]),
            "Unbiased means that the gradient's mean over draws is dense's gradient. A biased "
            "method can be as fast and still train worse: speed alone does not choose one.",
            tables.definitions(methods_of([c for c in run.cases if c.kind != "kernel"])),
        ],
    )


def _suite(run: Run) -> str:
    if _is_of_memory(run):
        return "memory"
    return "gpu" if any(case.device != "cpu" for case in run.cases) else "cpu"
