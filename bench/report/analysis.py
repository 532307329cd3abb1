"""Rows of one shape, fractions of the limit, fits and headline figures of a run."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memaop_triton.bench.report import text
from memaop_triton.bench.report.data import WEIGHT_GRAD_KINDS, Case, Method, Run
from memaop_triton.bench.report.document import Headline
from memaop_triton.bench.report.fits import Point, Power, TimeModel, fit_power, fit_time
from memaop_triton.bench.report.methods import ordered, rank

Setting = tuple[str, str, int]


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

    def share_of_limit(self, name: str) -> float | None:
        """The limit's time over that of the method `name`; `None` if it has no limit."""
        case, method = self.found[name]
        limit = case.limit_for(name)
        return None if limit is None else limit.ms.median / method.ms.median


def rows(cases: Sequence[Case]) -> list[Row]:
    """Cases gathered by kind, model, shape, ratio and setting."""
    gathered: dict[object, Row] = {}
    for case in cases:
        title = "" if case.kind in WEIGHT_GRAD_KINDS else case.title
        key = case.kind, title, case.model, case.m, case.n, case.p, case.k, case.setting
        row = gathered.setdefault(key, Row(case, {}))
        for name, method in case.methods.items():
            row.found.setdefault(name, (case, method))
    return list(gathered.values())


def ours(cases: Sequence[Case]) -> Iterator[tuple[Case, Method]]:
    """Every case with every method of ours in it."""
    for case in cases:
        for method in case.of_role("ours"):
            yield case, method


def main_method(run: Run) -> str | None:
    """The method that headlines and maps are about: `default`, else the first of ours."""
    found = [method for _, method in ours(run.of_kind(*WEIGHT_GRAD_KINDS, "layer", "step"))]
    return min(found, key=rank).name if found else None


def main_ratio(cases: Sequence[Case]) -> float:
    """1/8 if a case has it, else the most frequent ratio."""
    counts = Counter(case.ratio for case in cases)
    return 1 / 8 if 1 / 8 in counts else counts.most_common(1)[0][0]


def growth(run: Run) -> dict[tuple[str, Setting, int, int], dict[str, Power | None]]:
    """Fits of time against M, by width and setting and then by method; `None` with one size."""
    points: dict[tuple[str, Setting, int, int], dict[str, list[tuple[int, float]]]] = {}
    for case in run.of_kind("sweep_rows"):
        sweep = points.setdefault((text.ratio(case.ratio), case.setting, case.n, case.p), {})
        for method in case.methods.values():
            if method.role != "limit":
                sweep.setdefault(method.name, []).append((case.m, method.ms.median))
    return {
        key: {
            name: fit_power([m for m, _ in found], [ms for _, ms in found])
            for name, found in sweep.items()
        }
        for key, sweep in points.items()
    }


@dataclass(frozen=True)
class Models:
    """Time models of dense and of every method of ours, in one setting."""

    dense: TimeModel | None
    ours: dict[str, TimeModel | None]

    def speedup(self, name: str, m: int, n: int, p: int, ratio: float) -> float | None:
        """Predicted for one shape; `None` unless both models hold."""
        model = self.ours.get(name)
        if self.dense is None or model is None or not (self.dense.good and model.good):
            return None
        return self.dense(m, n, p, m) / model(m, n, p, max(1, round(ratio * m)))


def models(cases: Sequence[Case]) -> Models:
    """Fit them to all weight gradients among the cases, which must be of one setting."""
    points: dict[str, list[Point]] = {}
    dense: list[Point] = []
    for case in cases:
        if case.kind not in WEIGHT_GRAD_KINDS:
            continue
        for method in case.methods.values():
            if method.role == "ours":
                point = Point(case.m, case.n, case.p, case.k, method.ms.median)
                points.setdefault(method.name, []).append(point)
            elif method.role == "dense":
                dense.append(Point(case.m, case.n, case.p, case.m, method.ms.median))
    return Models(fit_time(dense), {name: fit_time(found) for name, found in points.items()})


def settings(cases: Sequence[Case]) -> list[Setting]:
    """The settings of the cases, the most frequent first."""
    return [setting for setting, _ in Counter(case.setting for case in cases).most_common()]


def headline(run: Run) -> list[Headline]:
    """The figures that matter, as far as they were measured."""
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
    cases = [case for case in run.of_kind(kind) if name in case.methods]
    if not cases:
        return None
    # One dtype: a mean over several dtypes would describe none of them.
    setting = settings(cases)[0]
    cases = [case for case in cases if case.setting == setting]
    ratio = main_ratio(cases)
    chosen = [case for case in cases if case.ratio == ratio]
    values = [case.methods[name].speedup.median for case in chosen]
    mean = math.exp(statistics.fmean(map(math.log, values)))
    detail = f"`{name}` at r = {text.ratio(ratio)}, against dense"
    if len(values) > 1:
        extent = f"{text.times(min(values))} to {text.times(max(values))}"
        detail += f"; geometric mean of {len(values)} cases, {extent}"
    else:
        detail += f"; {chosen[0].model or chosen[0].shape}"
    return Headline(text.times(mean), f"speed-up of the {what}", detail)


def _limit(run: Run) -> Headline | None:
    shares = [
        share
        for row in rows(run.of_kind("dw"))
        for method in row.methods
        if method.role == "ours" and (share := row.share_of_limit(method.name)) is not None
    ]
    if not shares:
        return None
    detail = f"median of {text.count(len(shares), 'call')}; lowest {text.percent(min(shares))}"
    return Headline(
        text.percent(statistics.median(shares)), "of the limit measured in the same run", detail
    )


def _overhead(run: Run, name: str) -> Headline | None:
    cases = [case for case in run.of_kind("overhead") if name in case.methods and case.dense]
    if not cases:
        return None
    case = min(cases, key=lambda one: one.m * one.n * one.p)
    beyond = overhead(case, case.methods[name])
    detail = f"`{name}` at {case.shape}, r = {text.ratio(case.ratio)}; time beyond dense's"
    return Headline(text.duration(beyond), "overhead of a call", detail)


def overhead(case: Case, method: Method) -> float:
    """Milliseconds of a call beyond dense's; NaN without a dense call."""
    return math.nan if case.dense is None else method.ms.median - case.dense.ms.median
