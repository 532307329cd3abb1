"""The page: quality.html, quality.md and their pictures, from the results that exist."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from memaop_triton.bench.report import text, writing
from memaop_triton.bench.report.document import Bullets, Document, Section
from memaop_triton.bench.studies.quality import evidence, results, sections, worth
from memaop_triton.bench.studies.quality.deciding_section import deciding_section
from memaop_triton.bench.studies.quality.results import Results
from memaop_triton.bench.studies.quality.running import SEEDS
from memaop_triton.bench.studies.quality.schemes import cells
from memaop_triton.bench.studies.quality.stash_section import stash_section
from memaop_triton.bench.studies.quality.tasks import TASKS

TITLE = "What sampled weight gradients cost in quality"
SUMMARY = (
    "Networks trained with weight gradients from K of M rows, beside dense ones from the same "
    "weights on the same batches: real data, every scheme, several seeds."
)


def write(folder: Path) -> list[Path]:
    """Write the report of the results in a folder beside them; the files.

    Raises:
        TableError: A file of results is not what it should be.
    """
    return writing.write(document(results.load(folder)), folder, "quality")


def document(found: Results) -> Document:
    """Put the page together."""
    runs = [run for by_seed in found.runs.values() for run in by_seed.values()]
    facts = [
        ("runs", f"{len(runs):,}"),
        ("seeds", str(len({run.seed for run in runs}))),
        ("diverged", str(sum(run.diverged_at > 0 for run in runs))),
        ("step times", found.machine or "not measured yet"),
    ]
    reading = Bullets(sections.READING, shown=len(sections.READING))
    return Document(
        "Study",
        TITLE,
        SUMMARY,
        tuple(facts),
        " ".join(_missing(found)),
        (
            sections.overview_section(found),
            deciding_section(found),
            stash_section(found),
            sections.equal_time_section(found),
            Section("reading", "How to read this", [reading]),
            *(sections.task_section(found, task) for task in TASKS.values()),
            worth.worth_section(found),
            evidence.noise_section(found),
            evidence.cross_terms_section(found),
            evidence.tuning_section(found),
        ),
        pictures="those below, in one file with the tables",
    )


def _missing(found: Results) -> Iterator[str]:
    """What has not been run or timed, in words."""
    gaps = []
    for name in TASKS:
        every = cells(name)
        short = sum(len(found.runs.get(cell, {})) < SEEDS for cell in every)
        if short:
            gaps.append(f"{name} {short} of {len(every)}")
    if gaps:
        yield f"Cells with fewer than {SEEDS} runs: {', '.join(gaps)}."
    untimed = sum(
        cell not in found.times for name in TASKS for cell in cells(name) if cell.has_own_steps
    )
    if untimed:
        yield f"{text.count(untimed, 'cell')} without step times."
    if found.stale:
        yield (
            f"{text.count(found.stale, 'run')} left out, because the task or the scheme has "
            "changed since."
        )
