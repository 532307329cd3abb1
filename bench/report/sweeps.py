"""Sections about how the cost of a call changes with ratio, width and rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from memaop_triton.bench.report import analysis, tables, text
from memaop_triton.bench.report.analysis import grouped, growth, main_method, rows, sweeps_of_rows
from memaop_triton.bench.report.charts import by_ratio, by_rows, by_width, grid
from memaop_triton.bench.report.data import WEIGHT_GRAD_KINDS, Case, Run
from memaop_triton.bench.report.document import Chart, Section
from memaop_triton.bench.report.methods import methods_of

# Ratios with a map of their own.
MAPS = 3


def against_ratio(run: Run) -> Section:
    """Speed-up against K/M, a chart per shape."""
    section = _against(
        run,
        Section("ratio", "Speed-up against ratio"),
        "sweep_ratio",
        lambda case: (case.m, case.n, case.p),
        lambda case: case.shape,
        by_ratio,
    )
    if section.blocks:
        section.blocks.insert(
            -1,
            "Bands span the quartiles; grey lines are baselines. Scores and memory cost the same "
            "at every ratio, which bends the lines away from the ideal.",
        )
    return section


def against_width(run: Run) -> Section:
    """Speed-up against N, a chart per number of rows and ratio."""
    return _against(
        run,
        Section("width", "Speed-up against width"),
        "sweep_width",
        lambda case: (case.m, case.ratio),
        lambda case: f"M = {case.m}, r = {text.ratio(case.ratio)}",
        by_width,
    )


def _against(
    run: Run,
    section: Section,
    kind: str,
    key: Callable[[Case], object],
    title: Callable[[Case], str],
    draw: Callable[[Sequence[Case]], Figure],
) -> Section:
    """The section with a chart for every group of cases of a kind, and the numbers."""
    cases = run.of_kind(kind)
    for group in grouped(cases, lambda case: (key(case), case.setting)):
        section.blocks.append(Chart(_named(group[0], title(group[0])), draw(group)))
    if cases:
        section.blocks.append(replace(tables.speedups(rows(cases)), folded="The numbers"))
    return section


def break_even(run: Run) -> Section:
    """Maps of M against N = P for the main method."""
    section = Section("break-even", "Break-even: which shapes win")
    name = main_method(run)
    cases = analysis.of_one_setting(run.of_kind(*WEIGHT_GRAD_KINDS))
    ratios = {case.ratio for case in cases if name in case.methods and case.n == case.p}
    if name is None or not ratios:
        return section
    nearest = sorted(ratios, key=lambda ratio: abs(math.log(8 * ratio)))[:MAPS]
    for ratio in sorted(nearest, reverse=True):
        title = f"`{name}`, r = {text.ratio(ratio)}"
        found = analysis.break_even(cases, name, ratio)
        section.blocks.append(Chart(title, grid(found), columns=3))
    section.blocks.append(
        "Speed-up of one call. Framed cells were measured; the others are interpolated between "
        "measured calls, linearly in the logarithms of M, N = P and r. Cells that no measured "
        "calls surround are left empty."
    )
    return section


def against_rows(run: Run) -> Section:
    """Time against M with fitted exponents, a chart per width and ratio."""
    section = Section("rows", "Time against the number of rows")
    for cases in sweeps_of_rows(run):
        first, fits = cases[0], growth(cases)
        title = _named(first, f"N = {first.n}, P = {first.p}, r = {text.ratio(first.ratio)}")
        section.blocks.append(Chart(title, by_rows(cases, fits)))
        methods = methods_of(cases, ("dense", "ours", "baseline"))
        section.blocks.append(tables.exponents(fits, methods))
    return section


def _named(case: Case, name: str) -> str:
    blocks = f", blocks of {case.block_rows}" if case.block_rows > 1 else ""
    return f"{name}, {case.dtype}{blocks}"
