"""Rows of one shape, growth, break-even, and the headline figures of a run."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import LinearNDInterpolator
from scipy.optimize import curve_fit
from scipy.spatial import QhullError

from memaop_triton.bench.report import text
from memaop_triton.bench.report.data import WEIGHT_GRAD_KINDS, Case, Method, Run
from memaop_triton.bench.report.document import Headline
from memaop_triton.bench.report.methods import ordered, rank

# An exponent this close to 1 is called linear.
LINEAR = 0.05


@dataclass(frozen=True)
class Row:
    """All methods of one shape and ratio, in however many cases they were timed.

    Attributes:
        case: The first of them: its shape and ratio stand for the row.
        found: (case, method) by name; the first where a name occurs twice.
    """

    case: Case
    found: dict[str, tuple[Case, Method]]

    @property
    def methods(self) -> list[Method]:
        """Ours, then baselines."""
        every = [method for _, method in self.found.values()]
        return ordered([method for method in every if method.role in ("ours", "baseline")])

    def baselines(self, case: Case) -> list[Method]:
        """The baselines, as timed in the rounds of `case` where they were."""
        return [case.methods.get(one.name, one) for one in self.methods if one.role == "baseline"]


def rows(cases: Sequence[Case]) -> list[Row]:
    """Cases gathered by kind, model, shape, ratio and setting."""

    def key(case: Case) -> object:
        title = "" if case.kind in WEIGHT_GRAD_KINDS else case.title
        return case.kind, title, case.model, case.m, case.n, case.p, case.k, case.setting

    found = []
    for group in grouped(cases, key):
        row = Row(group[0], {})
        for case in group:
            for name, method in case.methods.items():
                row.found.setdefault(name, (case, method))
        found.append(row)
    return found


def grouped(cases: Sequence[Case], key: Callable[[Case], object]) -> list[list[Case]]:
    """Cases of the same key together, in the order of the first of each."""
    groups: dict[object, list[Case]] = {}
    for case in cases:
        groups.setdefault(key(case), []).append(case)
    return list(groups.values())


def ours(cases: Sequence[Case]) -> Iterator[tuple[Case, Method]]:
    """Every case with every method of ours in it."""
    for case in cases:
        for method in case.of_role("ours"):
            yield case, method


def share_of_limit(case: Case, method: Method) -> float | None:
    """The limit's time over the method's; `None` without a limit."""
    return None if case.limit is None else case.limit.ms.median / method.ms.median


def overhead(case: Case, method: Method) -> float:
    """Milliseconds of a call beyond dense's."""
    return method.ms.median - case.dense.ms.median


def main_method(run: Run) -> str | None:
    """The method that headlines and maps are about: `default`, else the first of ours."""
    found = [method for _, method in ours(run.of_kind(*WEIGHT_GRAD_KINDS, "layer", "step"))]
    return min(found, key=rank).name if found else None


def main_ratio(cases: Sequence[Case]) -> float:
    """1/8 if a case has it, else the most frequent ratio."""
    counts = Counter(case.ratio for case in cases)
    return 1 / 8 if 1 / 8 in counts else counts.most_common(1)[0][0]


def of_one_setting(cases: Sequence[Case]) -> list[Case]:
    """The cases of the most frequent setting: rates of another dtype are others."""
    settings = Counter(case.setting for case in cases).most_common(1)
    return [case for case in cases if case.setting == settings[0][0]] if settings else []


@dataclass(frozen=True)
class Power:
    """time = fixed + scale · M^exponent.

    Attributes:
        fixed: What any call takes, in the times' unit, not below zero.
        exponent: Of the part that grows.
        error: The exponent's standard error.
        sizes: How many M there were.
    """

    fixed: float
    exponent: float
    error: float
    sizes: int

    @property
    def growth(self) -> str:
        """`linear`, `slower than linear` or `faster than linear`."""
        if abs(self.exponent - 1) <= LINEAR:
            return "linear"
        return f"{'slower' if self.exponent < 1 else 'faster'} than linear"


def sweeps_of_rows(run: Run) -> list[list[Case]]:
    """The cases that differ in M alone, together."""
    return grouped(run.of_kind("sweep_rows"), lambda c: (c.n, c.p, c.ratio, c.setting))


def growth(cases: Sequence[Case]) -> dict[str, Power | None]:
    """Fits of time against M by method; `None` with fewer sizes than determine one."""
    points: dict[str, list[tuple[int, float]]] = {}
    for case in cases:
        for method in case.methods.values():
            points.setdefault(method.name, []).append((case.m, method.ms.median))
    return {
        name: fit_power([m for m, _ in found], [ms for _, ms in found])
        for name, found in points.items()
    }


def fit_power(sizes: Sequence[float], times: Sequence[float]) -> Power | None:
    """Least squares of log(time); `None` unless there are more sizes than the three unknowns."""
    if len(set(sizes)) < 4:
        return None
    least, smallest = min(times), min(sizes)
    # Relative to the smallest, all three unknowns are about 1.
    found, covariance = curve_fit(
        lambda x, fixed, scale, exponent: np.log(fixed + scale * x**exponent),
        np.asarray(sizes) / smallest,
        np.log(np.asarray(times) / least),
        p0=(0.1, 0.9, 1.0),
        bounds=([0, 1e-9, 0], np.inf),
        xtol=1e-12,
    )
    return Power(
        float(found[0] * least), float(found[2]), float(covariance[2, 2] ** 0.5), len(sizes)
    )


@dataclass(frozen=True)
class Field:
    """One cell of the break-even map.

    Attributes:
        m: Rows.
        width: N = P.
        speedup: NaN where it was not measured and no measured calls surround it.
        measured: Whether the speed-up was measured, or else interpolated.
    """

    m: int
    width: int
    speedup: float
    measured: bool


def break_even(cases: Sequence[Case], name: str, ratio: float) -> list[Field]:
    """The map of M against N = P of one method and ratio, in powers of two.

    What was not measured is interpolated between calls of all ratios, linearly in the logarithms of
    M, N and the ratio.
    """
    square = {
        (case.m, case.n, case.ratio): case.methods[name].speedup.median
        for case in cases
        if case.n == case.p and name in case.methods
    }
    places, speedups = np.log2(list(square)), np.log2(list(square.values()))
    try:
        between = LinearNDInterpolator(places, speedups)
    except QhullError:  # too few, or all in one plane: of one ratio or one width
        between = None
    low, high = (range_.astype(int) for range_ in (places.min(axis=0), places.max(axis=0)))
    heights, widths = ([2**i for i in range(low[side], high[side] + 1)] for side in (0, 1))
    found = []
    for m in heights:
        for width in widths:
            measured = square.get((m, width, ratio))
            if measured is not None:
                found.append(Field(m, width, measured, True))
                continue
            place = np.log2([m, width, ratio])
            speedup = math.nan if between is None else float(2 ** between(place)[0])
            found.append(Field(m, width, speedup, False))
    return found


def headline(run: Run) -> list[Headline]:
    """The headline figures, as far as they were measured."""
    name = main_method(run)
    if name is None:
        return []
    found = [
        _speedup(run, name, "dw", "weight gradient"),
        _speedup(run, name, "step", "whole training step"),
        _limit(run),
        _overhead(run, name),
    ]
    return [figure for figure in found if figure is not None]


def _speedup(run: Run, name: str, kind: str, what: str) -> Headline | None:
    # One dtype: a mean over several dtypes would describe none of them.
    cases = of_one_setting([case for case in run.of_kind(kind) if name in case.methods])
    if not cases:
        return None
    ratio = main_ratio(cases)
    chosen = [case for case in cases if case.ratio == ratio]
    values = [case.methods[name].speedup.median for case in chosen]
    detail = f"`{name}` at r = {text.ratio(ratio)}, against dense"
    if len(values) > 1:
        extent = f"{text.times(min(values))} to {text.times(max(values))}"
        detail += f"; geometric mean of {len(values)} cases, {extent}"
    else:
        detail += f"; {chosen[0].model or chosen[0].shape}"
    mean = text.times(statistics.geometric_mean(values))
    return Headline(mean, f"speed-up of the {what}", detail)


def _limit(run: Run) -> Headline | None:
    shares = [
        share
        for row in rows(run.of_kind("dw"))
        for case, method in row.found.values()
        if method.role == "ours" and (share := share_of_limit(case, method)) is not None
    ]
    if not shares:
        return None
    detail = f"median of {text.count(len(shares), 'call')}; lowest {text.percent(min(shares))}"
    return Headline(
        text.percent(statistics.median(shares)), "of the limit measured in the same run", detail
    )


def _overhead(run: Run, name: str) -> Headline | None:
    cases = [case for case in run.of_kind("overhead") if name in case.methods]
    if not cases:
        return None
    case = min(cases, key=lambda one: one.m * one.n * one.p)
    beyond = overhead(case, case.methods[name])
    detail = f"`{name}` at {case.shape}, r = {text.ratio(case.ratio)}; time beyond dense's"
    return Headline(text.duration(beyond), "overhead of a call", detail)
