"""Sections about how the cost of a call changes with ratio, width and rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from memaop_triton.bench.report import tables, text
from memaop_triton.bench.report.analysis import (
    Models,
    growth,
    main_method,
    models,
    rows,
    settings,
)
from memaop_triton.bench.report.breakeven import fields
from memaop_triton.bench.report.charts import by_ratio, by_rows, by_width, grid
from memaop_triton.bench.report.data import WEIGHT_GRAD_KINDS, Case, Run
from memaop_triton.bench.report.document import Chart, Section, Table
from memaop_triton.bench.report.fits import LINEAR, TimeModel
from memaop_triton.bench.report.methods import item_size, methods_of

# Ratios with a map of their own.
MAPS = 3


def against_ratio(run: Run) -> Section:
    """Speed-up against K/M, a chart per shape."""
    section = Section("ratio", "Speed-up against ratio")
    groups = _groups(run.of_kind("sweep_ratio"), lambda c: (c.m, c.n, c.p, c.setting))
    for cases in groups:
        if len({case.ratio for case in cases}) > 1:
            section.blocks.append(Chart(_named(cases[0], cases[0].shape), by_ratio(cases)))
        else:
            section.blocks.append(f"{cases[0].shape}: a single ratio, so there is no line to draw.")
    if section.blocks:
        section.blocks.append(
            "Bands span the quartiles; grey lines are baselines. Scores and memory cost the same "
            "at every ratio, which bends the lines away from the ideal."
        )
        section.blocks.append(_folded(run.of_kind("sweep_ratio")))
    return section


def against_width(run: Run) -> Section:
    """Speed-up against N, a chart per number of rows and ratio."""
    section = Section("width", "Speed-up against width")
    groups = _groups(run.of_kind("sweep_width"), lambda c: (c.m, c.ratio, c.setting))
    for cases in groups:
        title = _named(cases[0], f"M = {cases[0].m}, r = {text.ratio(cases[0].ratio)}")
        if len({case.n for case in cases}) > 1:
            section.blocks.append(Chart(title, by_width(cases)))
        else:
            section.blocks.append(f"{title}: a single width, so there is no line to draw.")
    if section.blocks:
        section.blocks.append(_folded(run.of_kind("sweep_width")))
    return section


def break_even(run: Run) -> Section:
    """Maps of M against N = P for the main method, and the model behind them."""
    section = Section("break-even", "Break-even: which shapes win")
    name = main_method(run)
    every = run.of_kind(*WEIGHT_GRAD_KINDS)
    if name is None or not every:
        return section
    # One setting: the rates of another dtype are others.
    setting = settings(every)[0]
    cases = [case for case in every if case.setting == setting]
    fitted = models(cases)
    ratios = sorted({case.ratio for case in cases if name in case.methods}, reverse=True)
    for ratio in _chosen(ratios):
        found = fields(cases, fitted, name, ratio)
        if found:
            title = f"`{name}`, r = {text.ratio(ratio)}"
            section.blocks.append(Chart(title, grid(found), columns=3))
    if section.blocks:
        section.blocks.append(_how_fitted(fitted, name))
        section.blocks.append(tables.time_models(fitted, item_size(setting[0])))
    return section


def _chosen(ratios: Sequence[float]) -> list[float]:
    """Up to `MAPS` ratios, those nearest to 1/8."""
    nearest = sorted(ratios, key=lambda ratio: abs(math.log(8 * ratio)))[:MAPS]
    return sorted(nearest, reverse=True)


def _how_fitted(fitted: Models, name: str) -> str:
    model, dense = fitted.ours.get(name), fitted.dense
    if model is None or dense is None:
        return (
            "Speed-up of one call. Measured cells only: too few shapes to tell the terms of a "
            "model of time apart."
        )
    errors = f"({_errors(name, model)}; {_errors('dense', dense)})"
    if not (model.good and dense.good):
        return (
            "Speed-up of one call. Measured cells only: time = a + b·M(N+P) + c·K·N·P does not fit "
            f"well enough {errors}."
        )
    return (
        "Speed-up of one call. Framed cells were measured; the others are predicted by time = "
        f"a + b·M(N+P) + c·K·N·P, fitted to all measured calls {errors}. Pale cells lie beyond "
        "what was measured."
    )


def _errors(name: str, model: TimeModel) -> str:
    median, worst = text.percent(model.median_error), text.percent(model.worst_error)
    return f"median error of `{name}` {median}, worst {worst}"


def against_rows(run: Run) -> Section:
    """Time against M with fitted exponents, a chart per width and ratio."""
    section = Section("rows", "Time against the number of rows")
    fits = growth(run)
    for cases in _groups(run.of_kind("sweep_rows"), lambda c: (c.n, c.p, c.ratio, c.setting)):
        first = cases[0]
        by_name = fits[text.ratio(first.ratio), first.setting, first.n, first.p]
        title = _named(first, f"N = {first.n}, P = {first.p}, r = {text.ratio(first.ratio)}")
        if len({case.m for case in cases}) == 1:
            section.blocks.append(f"{title}: a single size, so there is no fit.")
            continue
        methods = methods_of(cases, ("dense", "ours", "baseline"))
        linear = [
            one.name
            for one in methods
            if (fit := by_name[one.name]) is not None and fit.growth == "linear"
        ]
        named = ", ".join(linear) or "none"
        section.blocks.append(Chart(title, by_rows(cases, by_name)))
        section.blocks.append(f"Linear in M (exponent within {LINEAR:g} of 1): {named}.")
        section.blocks.append(tables.exponents(by_name, methods))
    return section


def _groups(cases: Sequence[Case], key: Callable[[Case], object]) -> list[list[Case]]:
    groups: dict[object, list[Case]] = {}
    for case in cases:
        groups.setdefault(key(case), []).append(case)
    return list(groups.values())


def _named(case: Case, name: str) -> str:
    blocks = f", blocks of {case.block_rows}" if case.block_rows > 1 else ""
    return f"{name}, {case.dtype}{blocks}"


def _folded(cases: Sequence[Case]) -> Table:
    return replace(tables.speedups(rows(cases)), folded="The numbers")
