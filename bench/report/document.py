"""The head of a report, and all of it as one object that is then written as HTML and Markdown."""

from __future__ import annotations

from dataclasses import dataclass

from memaop_triton.bench.report import text
from memaop_triton.bench.report.analysis import Figure, headline
from memaop_triton.bench.report.blocks import Section
from memaop_triton.bench.report.compare import Comparison
from memaop_triton.bench.report.data import Machine, Run
from memaop_triton.bench.report.sections import missing, sections


@dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        title: Its heading.
        summary: What was measured, in a sentence or two.
        facts: (name, value) of machine, versions and date.
        figures: The headline numbers.
        missing: What the run has no numbers for; may be empty.
        sections: In order.
        kind: What is written above the title.
        pictures: What only the page has, for Markdown.
    """

    title: str
    summary: str
    facts: tuple[tuple[str, str], ...]
    figures: tuple[Figure, ...]
    missing: str
    sections: tuple[Section, ...]
    kind: str = "Performance report"
    pictures: str = "roofline, curves, maps"


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
        f"memaop-triton on {name}",
        summary,
        tuple(_facts(run)),
        tuple(headline(run)),
        missing(run),
        tuple(sections(run, comparison)),
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
