"""Losses: every check that a call of our methods fails, and the cause where the run shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memaop_triton.bench.report import text
from memaop_triton.bench.report.analysis import (
    Power,
    growth,
    ours,
    overhead,
    rows,
    share_of_limit,
    sweeps_of_rows,
)
from memaop_triton.bench.report.data import WEIGHT_GRAD_KINDS, Case, Method, Run
from memaop_triton.bench.report.methods import definition, traffic

WANTED_SHARE = 0.9
WANTED_OVERHEAD_MS = 0.1
# What our methods do in addition to drawing rows, by memory.
_EXTRA_WORK = {
    "residual": "a row memory is read, updated and written too, which drawing rows alone is spared",
    "subspace": "the subspace's share is computed as well, which leaves less to the draw's noise",
}
# A call whose fixed costs are at least this share of its time is called small.
_SMALL = 0.3


@dataclass(frozen=True)
class Reason:
    """Why a call fails a check, as far as the run shows.

    Attributes:
        text: In words; may be empty.
        cause: What it has in common with reasons that differ in numbers.
        more_work: Whether the call does work that what it is compared with does not.
    """

    text: str = ""
    cause: str = ""
    more_work: bool = False


@dataclass(frozen=True)
class Miss:
    """One call that fails a check.

    Attributes:
        where: Its shape and ratio, or its title.
        method: Of ours.
        what: By how much it fails.
        severity: Larger is worse, within one check.
        why: The reason.
        beside: What it is compared with, if that is the same for all methods there.
    """

    where: str
    method: str
    what: str
    severity: float
    why: Reason = Reason()
    beside: str = ""


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        claim: What the failing calls are.
        opposite: What holds if none fails.
        checked: How many calls were checked; 0 if the run has none of the kind.
        misses: The failing ones, the worst first; those that do more work come last.
    """

    claim: str
    opposite: str
    checked: int
    misses: tuple[Miss, ...]


def findings(run: Run) -> list[Finding]:
    """All checks that the run allows, in the order of the page."""
    cases = [case for case in run.cases if case.kind != "memory"]  # which says it by itself
    every = list(ours(cases))
    reached, most = text.percent(WANTED_SHARE), text.duration(WANTED_OVERHEAD_MS)
    checks = (
        _finding(
            "slower than dense",
            "Every call is faster than dense.",
            [_beside_dense(run, case, method) for case, method in every],
        ),
        _finding(
            "slower than a baseline",
            "Every call is faster than every baseline.",
            [
                _beside_baselines(run, case, method, baselines)
                for row in rows(cases)
                for case, method in row.found.values()
                if method.role == "ours" and (baselines := row.baselines(case))
            ],
        ),
        _finding(
            "below a wanted speed-up",
            "Every wanted speed-up is reached.",
            [
                _beside_wanted(run, case, method, case.wanted[method.name])
                for case, method in every
                if method.name in case.wanted
            ],
        ),
        _finding(
            f"below {reached} of the limit",
            f"Every call reaches {reached} of its limit.",
            [
                _beside_limit(run, case, method, share)
                for case, method in every
                if (share := share_of_limit(case, method)) is not None
            ],
        ),
        _finding(
            f"an overhead above {most}",
            f"No call has an overhead above {most}.",
            [_overhead(case, method) for case, method in ours(run.of_kind("overhead"))],
        ),
        _finding(
            "a time that grows faster than M",
            "No call's time grows faster than M.",
            [
                _growth(cases[0], name, fit)
                for cases in sweeps_of_rows(run)
                for name, fit in growth(cases).items()
                if fit is not None and name in {method.name for _, method in ours(cases)}
            ],
        ),
    )
    return [finding for finding in checks if finding.checked]


def _finding(claim: str, opposite: str, calls: Sequence[Miss | None]) -> Finding:
    """A check of calls, `None` for each that passes."""
    misses = [miss for miss in calls if miss is not None]
    worst_first = sorted(misses, key=lambda miss: (miss.why.more_work, -miss.severity))
    return Finding(claim, opposite, len(calls), tuple(worst_first))


def _beside_dense(run: Run, case: Case, method: Method) -> Miss | None:
    speed = method.speedup
    if speed.median >= 1:
        return None
    what = text.times(speed.median) + (" (quartiles reach 1)" if speed.q3 >= 1 else "")
    return Miss(_place(case), method.name, what, -speed.median, reason(run, case, method))


def _beside_baselines(
    run: Run, case: Case, method: Method, baselines: Sequence[Method]
) -> Miss | None:
    mine = method.speedup.median
    best = max(baselines, key=lambda one: one.speedup.median)
    if best.speedup.median <= mine:
        return None
    beside = f"the fastest baseline, {best.name}, {text.times(best.speedup.median)}"
    why = _why_slower(run, case, method, best)
    behind = best.speedup.median / mine
    return Miss(_place(case), method.name, text.times(mine), behind, why, beside)


def _why_slower(run: Run, case: Case, method: Method, baseline: Method) -> Reason:
    why = reason(run, case, method)
    mine, other = definition(method), definition(baseline)
    has_more = mine and other and mine.memory != other.memory and mine.memory in _EXTRA_WORK
    if mine and has_more and why.cause != "small":
        extra = _EXTRA_WORK[mine.memory]
        return Reason(extra, extra, more_work=True)
    return why


def _beside_wanted(run: Run, case: Case, method: Method, wanted: float) -> Miss | None:
    got = method.speedup.median
    if got >= wanted:
        return None
    what = f"{text.times(got)}, wanted {text.times(wanted)}"
    why = reason(run, case, method)
    if case.limit is not None and case.limit.speedup.median < wanted:
        cap = f"the limit measured in this run is {text.times(case.limit.speedup.median)}"
        why = Reason(cap, cap)
    return Miss(_place(case), method.name, what, wanted / got, why)


def _beside_limit(run: Run, case: Case, method: Method, share: float) -> Miss | None:
    if share >= WANTED_SHARE:
        return None
    why = reason(run, case, method)
    return Miss(_place(case), method.name, text.percent(share), -share, why)


def _overhead(case: Case, method: Method) -> Miss | None:
    beyond = overhead(case, method)
    if beyond <= WANTED_OVERHEAD_MS:
        return None
    return Miss(_place(case), method.name, text.duration(beyond), beyond)


def _growth(case: Case, name: str, fit: Power) -> Miss | None:
    if not fit.growth.startswith("faster"):
        return None
    where = f"N = {case.n}, P = {case.p}, r = {text.ratio(case.ratio)}"
    return Miss(where, name, f"M^{fit.exponent:.2f}", fit.exponent)


def _place(case: Case) -> str:
    if case.kind in ("layer", "step", "kernel"):
        return case.title
    return ", ".join([case.shape, f"r = {text.ratio(case.ratio)}", *case.unusual])


def reason(run: Run, case: Case, method: Method) -> Reason:
    """What takes the time of a call, from the rates and fixed costs of the same run.

    A layer and a step are capped by their FLOPs: the weight gradient is a third of them.
    """
    if case.kind in ("layer", "step"):
        sampled = "sampled" in method.name
        cap = 1 / (1 / 3 + 2 * case.ratio / 3) if sampled else 1 / (2 / 3 + case.ratio / 3)
        what = f"by FLOPs alone, linear layers could reach {text.times(cap)} at this ratio"
        return Reason(what, what)
    if case.kind not in WEIGHT_GRAD_KINDS:
        return Reason()
    fixed = _fixed_ms(run, case, method)
    if fixed is not None and fixed >= _SMALL * method.ms.median:
        share = fixed / method.ms.median
        of = "all of it" if share >= 0.995 else f"{text.percent(share)} of it"
        what = f"small layer: what any call costs, {text.duration(fixed)}, is {of}"
        return Reason(what, "small")
    cost = traffic(case, method)
    if cost is None or run.machine is None or case.dtype not in run.machine.gemm_gflops:
        return Reason()
    passed, product = cost.milliseconds(run.machine, case.dtype)
    shares = [min(1.0, part / method.ms.median) for part in (passed, product)]
    if sum(shares) < _SMALL:
        part = text.percent(sum(shares))
        what = f"small layer: at this machine's rates its work takes {part} of the time"
        return Reason(what, "small")
    bound = "memory" if passed > product else "arithmetic"
    what = (
        f"bound by {bound}: at this machine's rates the pass over all rows is "
        f"{text.percent(shares[0])} of the time, the GEMM {text.percent(shares[1])}"
    )
    return Reason(what, bound)


def by_place(misses: Sequence[Miss]) -> list[list[Miss]]:
    """Misses of one place and cause together, in the order of their worst.

    Of a method that was timed there more than once, in two sweeps, the worst is kept.
    """
    groups: dict[tuple[str, str], dict[str, Miss]] = {}
    for miss in misses:
        groups.setdefault((miss.where, miss.why.cause), {}).setdefault(miss.method, miss)
    return [list(group.values()) for group in groups.values()]


def _fixed_ms(run: Run, case: Case, method: Method) -> float | None:
    """The time of the method's smallest call among the overhead cases of the same setting."""
    found = [
        one.methods[method.name].ms.median
        for one in run.of_kind("overhead")
        if one.setting == case.setting and method.name in one.methods
    ]
    return min(found, default=None)
