"""A run as sections, in the order of the page; a section without numbers is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from memaop_triton.bench.report import tables, text
from memaop_triton.bench.report.analysis import headline, rows
from memaop_triton.bench.report.charts import bars, roofline
from memaop_triton.bench.report.compare import NOTABLE_PERCENT, Comparison
from memaop_triton.bench.report.data import Machine, Run
from memaop_triton.bench.report.document import (
    Bullets,
    Chart,
    Code,
    Document,
    Section,
    Subheading,
)
from memaop_triton.bench.report.findings import Miss, by_place, findings
from memaop_triton.bench.report.methods import methods_of
from memaop_triton.bench.report.roofline import calls
from memaop_triton.bench.report.sweeps import (
    against_ratio,
    against_rows,
    against_width,
    break_even,
)


def document(run: Run, comparison: Comparison | None) -> Document:
    """Put a report together."""
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
        _missing(run),
        tuple(_sections(run, comparison)),
        tuple(headline(run)),
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    facts = [("suite", run.name)]
    if run.date:
        facts.append(("date", run.date[:16].replace("T", " ")))
    if run.commit:
        facts.append(("commit", run.commit[:10]))
    if run.machine:
        facts += _machine(run.machine)
    return facts


def _machine(machine: Machine) -> list[tuple[str, str]]:
    facts = [("machine", machine.name)]
    if machine.threads is not None:
        of = "" if machine.cores is None else f" on {text.count(machine.cores, 'core')}"
        facts.append(("threads", f"{machine.threads}{of}"))
    if machine.gemm_gflops:
        rates = (f"{text.rate(one, 'FLOP')} {dtype}" for dtype, one in machine.gemm_gflops.items())
        facts.append(("GEMM", ", ".join(rates)))
    if machine.stream_gbs is not None:
        rate = f"{text.rate(machine.stream_gbs, 'B')} read"
        if machine.triad_gbs is not None:
            rate += f", {text.rate(machine.triad_gbs, 'B')} update"
        facts.append(("memory", rate))
    for name, value in (
        ("caches", _joined(machine.caches)),
        ("versions", _joined(machine.versions)),
        ("clocks", machine.clocks),
        ("load before", machine.load_before),
    ):
        if value:
            facts.append((name, value))
    return facts


def _joined(values: object) -> str:
    items = values.items() if isinstance(values, dict) else ()
    return ", ".join(f"{name} {value}" for name, value in items)


def _sections(run: Run, comparison: Comparison | None) -> list[Section]:
    """Every section that has something to show."""
    every = [
        _findings(run),
        _weight_grad(run),
        _roofline(run),
        against_ratio(run),
        against_width(run),
        break_even(run),
        against_rows(run),
        _steps(run),
        _kernels(run),
        _overhead(run),
        _comparison(comparison),
        _method(run),
    ]
    return [section for section in every if section.blocks]


def _missing(run: Run) -> str:
    """One line on what the run has no numbers for; empty if it has all."""
    wanted = {
        "the machine's rates (no roofline)": run.machine is not None,
        "the weight gradient": bool(run.of_kind("dw")),
        "speed-up against ratio": bool(run.of_kind("sweep_ratio")),
        "speed-up against width": bool(run.of_kind("sweep_width")),
        "time against rows": bool(run.of_kind("sweep_rows")),
        "layers": bool(run.of_kind("layer")),
        "training steps": bool(run.of_kind("step")),
        "kernels": bool(run.of_kind("kernel")),
        "the overhead of a call": bool(run.of_kind("overhead")),
    }
    absent = [what for what, there in wanted.items() if not there]
    unmeasured = sorted({name for case in run.cases for name in case.unmeasured})
    found = f"Not measured in this run: {', '.join(absent)}." if absent else ""
    if unmeasured:
        found += f" Without a time in some case: {', '.join(unmeasured)}."
    return found.strip()


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
    found = calls(run.of_kind("dw"), machine)
    for dtype in dict.fromkeys(call.case.dtype for call in found):
        some = [call for call in found if call.case.dtype == dtype]
        title = f"Roofline, {dtype}"
        section.blocks.append(Chart(title, roofline(some, machine, dtype)))
    if found:
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


def _comparison(comparison: Comparison | None) -> Section:
    section = Section("comparison", "Compared with an earlier run")
    if comparison is None:
        return section
    where = "on the same machine"
    if not comparison.same_machine:
        where = "not known to be on the same machine, so speed-ups are compared and times are not"
    when = (comparison.earlier.date or "an unknown date")[:10]
    section.blocks.append(f"Against the run `{comparison.earlier.name}` of {when}, {where}.")
    fallen = comparison.regressions(NOTABLE_PERCENT)
    limit = f"{NOTABLE_PERCENT:g} %"
    if fallen:
        section.blocks.append(Subheading(f"Slower by more than {limit}"))
        section.blocks.append(Bullets(tuple(map(str, fallen))))
    elif comparison.changes:
        section.blocks.append(f"No call is slower by more than {limit} beyond the quartiles.")
    if comparison.changes:
        section.blocks.append(tables.changes(comparison))
    for what, names in (("Only in the earlier run", comparison.gone), ("New", comparison.added)):
        if names:
            section.blocks.extend([Subheading(what), Bullets(names)])
    return section


def _method(run: Run) -> Section:
    suite = run.name if run.name in ("quick", "cpu", "gpu") else _suite(run)
    return Section(
        "method",
        "How it was measured, and how to repeat it",
        [
            Code(f"memaop-triton bench --suite {suite} --output results"),
            "All methods of a case run in turn, round after round, in one process. A speed-up is "
            "dense's time over the method's in the same round, so that a machine that slows down "
            "slows both; shown are the median of the rounds and the quartiles.",
            "The limit is what no method with the same traffic can beat: a GEMM of K rows that lie "
            "together, plus one pass over X and G. A row memory is read, updated and written in "
            "that pass; a subspace adds the rows that its 2·M·q·(N+P) FLOPs would pay for. It is "
            "measured in the same rounds.",
            "Unbiased means that the gradient's mean over draws is dense's gradient. A biased "
            "method can be as fast and still train worse: speed alone does not choose one.",
            tables.definitions(methods_of([c for c in run.cases if c.kind != "kernel"])),
        ],
    )


def _suite(run: Run) -> str:
    return "gpu" if any(case.device != "cpu" for case in run.cases) else "cpu"
