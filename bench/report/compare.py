"""A run beside an earlier one: speed-ups against dense, which survive another machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from memaop_triton.bench.report import text
from memaop_triton.bench.report.data import Case, Method, Run

# Changes beyond it are pointed out on the page, if the quartiles confirm them.
NOTABLE_PERCENT = 5.0


@dataclass(frozen=True)
class Change:
    """One call of ours in both runs."""

    case: Case
    new: Method
    old: Method

    @property
    def ratio(self) -> float:
        """New speed-up over old: above 1 is better."""
        return self.new.speedup.median / self.old.speedup.median

    @property
    def apart(self) -> bool:
        """Whether the ranges between the quartiles do not touch."""
        new, old = self.new.speedup, self.old.speedup
        return new.q3 < old.q1 or new.q1 > old.q3

    def slower_by(self, percent: float) -> bool:
        """Whether the speed-up fell by more than `percent`, and beyond the quartiles of both."""
        return self.ratio < 1 - percent / 100 and self.apart

    def __str__(self) -> str:
        new, old = self.new.speedup, self.old.speedup
        fall = 100 * (1 - self.ratio)
        return (
            f"{self.case.title}, {self.new.name}: {text.times(old.median)} before, "
            f"{text.times(new.median)} now ({fall:.1f} % less)"
        )


@dataclass(frozen=True)
class Comparison:
    """Every call of ours that both runs have.

    Attributes:
        earlier: The run compared with.
        same_machine: Whether name and threads agree, so that times may be compared too.
        changes: The largest loss first.
        gone: Cases with methods that only the earlier run has.
        added: Cases with methods that only the new run has.
    """

    earlier: Run
    same_machine: bool
    changes: tuple[Change, ...]
    gone: tuple[str, ...]
    added: tuple[str, ...]

    def regressions(self, percent: float) -> list[Change]:
        """The calls whose speed-up fell by more than `percent`, and beyond the quartiles."""
        return [change for change in self.changes if change.slower_by(percent)]


def compare(run: Run, earlier: Run) -> Comparison:
    """Match the calls of ours by kind, title, shape, setting, model and method."""
    new, old = dict(_calls(run)), dict(_calls(earlier))
    changes = [Change(new[key][0], new[key][1], old[key][1]) for key in new if key in old]
    return Comparison(
        earlier,
        _same_machine(run, earlier),
        tuple(sorted(changes, key=lambda change: change.ratio)),
        _named(old[key] for key in old if key not in new),
        _named(new[key] for key in new if key not in old),
    )


def _calls(run: Run) -> Iterator[tuple[object, tuple[Case, Method]]]:
    for case in run.cases:
        for method in case.of_role("ours"):
            shape = case.m, case.n, case.p, case.k
            key = (case.kind, case.title, case.model, shape, case.setting, method.name)
            yield key, (case, method)


def _named(calls: Iterable[tuple[Case, Method]]) -> tuple[str, ...]:
    methods: dict[str, list[str]] = {}
    for case, method in calls:
        methods.setdefault(case.title, []).append(f"`{method.name}`")
    return tuple(f"{title}: {', '.join(names)}" for title, names in methods.items())


def _same_machine(run: Run, earlier: Run) -> bool:
    one, other = run.machine, earlier.machine
    if one is None or other is None:
        return False
    return (one.name, one.threads) == (other.name, other.threads)
