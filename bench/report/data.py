"""The benchmarks' JSON file as dataclasses.

Times are in milliseconds, rates in GB/s and GFLOP/s, memory in bytes. A speed-up is dense's time
over a method's time, taken per round, so that the machine's drift cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from memaop_triton.bench.report.fields import ReportError, Shown, member, parse, read_json

Kind = Literal[
    "kernel", "dw", "layer", "step", "sweep_rows", "sweep_ratio", "sweep_width", "overhead"
]
Role = Literal["dense", "ours", "baseline", "limit"]
# Kinds whose calls compute one weight gradient, and nothing else.
WEIGHT_GRAD_KINDS = ("dw", "sweep_rows", "sweep_ratio", "sweep_width", "overhead")


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    q1: float
    q3: float


@dataclass(frozen=True)
class Method:
    """What one method took in one case.

    Attributes:
        name: The method, e.g. `default` or `vcas`.
        role: What it stands for.
        label: Its name for readers.
        ms: Milliseconds of a call.
        speedup: Dense's time over this one's; of the medians, without a spread, if a limit or the
            dense call came without.
        peak_bytes: Memory that a call holds at most beside its operands; `None` if not measured.
        note: What a reader has to know about this number.
        cold: The speed-up with cold caches; `None` if not measured.
    """

    name: str
    role: Role
    label: str
    ms: Spread
    speedup: Spread
    peak_bytes: int | None = None
    note: str | None = None
    cold: Spread | None = None


@dataclass(frozen=True)
class Case:
    """One shape and ratio, and every method timed on it in turn.

    Attributes:
        kind: What was timed.
        title: Its name for readers.
        m: Rows of X and G.
        n: Columns of X.
        p: Columns of G.
        k: Rows computed.
        ratio: K/M.
        dtype: As torch writes it, without `torch.`.
        device: `cpu` or `cuda`.
        block_rows: Rows that are picked together.
        methods: By name, in the file's order.
        model: What network, for a step.
        wanted: The speed-up asked for, by method.
        unmeasured: Methods whose time is not a number.
    """

    kind: Kind
    title: str
    m: int
    n: int
    p: int
    k: int
    ratio: float
    dtype: str
    device: str
    block_rows: int
    methods: Mapping[str, Method]
    model: str | None = None
    wanted: Mapping[str, float] = field(default_factory=dict)
    unmeasured: tuple[str, ...] = ()

    def of_role(self, role: str) -> list[Method]:
        """Its methods of one role."""
        return [method for method in self.methods.values() if method.role == role]

    @property
    def dense(self) -> Method | None:
        """The dense call, `None` if it is not in the file."""
        return next(iter(self.of_role("dense")), None)

    def limit_for(self, name: str) -> Method | None:
        """The limit that was measured for the method `name`.

        One whose name ends in the method's (`limit-topk`, `limit:topk`), else the one limit of the
        case, else none.
        """
        limits = self.of_role("limit")
        for limit in limits:
            if limit.name in (f"limit-{name}", f"limit:{name}", f"limit_{name}", f"{name}-limit"):
                return limit
        return limits[0] if len(limits) == 1 else None

    @property
    def shape(self) -> str:
        """`8192×1024×1024`: M, N and P."""
        return f"{self.m}×{self.n}×{self.p}"

    @property
    def unusual(self) -> list[str]:
        """What is not as in most cases, in words: another dtype than float32, rows in blocks."""
        blocks = [f"blocks of {self.block_rows}"] if self.block_rows > 1 else []
        return [self.dtype, *blocks] if self.dtype != "float32" else blocks

    @property
    def setting(self) -> tuple[str, str, int]:
        """What a fit must not mix: dtype, device and rows per block."""
        return self.dtype, self.device, self.block_rows


@dataclass(frozen=True)
class Machine:
    """Where the benchmarks ran, and its rates measured in the same run.

    Attributes:
        name: Of the CPU or GPU.
        threads: Threads that computed.
        cores: Cores there are.
        gemm_gflops: Rate of a large GEMM by dtype.
        stream_gbs: Bandwidth of reading.
        triad_gbs: Bandwidth of reading, updating and writing.
        caches: Sizes by level.
        versions: Of packages and libraries.
        clocks: As the machine reported them.
        load_before: Load average before the run.
    """

    name: str
    threads: int | None = None
    cores: int | None = None
    gemm_gflops: Mapping[str, float] = field(default_factory=dict)
    stream_gbs: float | None = None
    triad_gbs: float | None = None
    caches: Mapping[str, Shown] = field(default_factory=dict)
    versions: Mapping[str, Shown] = field(default_factory=dict)
    clocks: Shown | None = None
    load_before: Shown | None = None


@dataclass(frozen=True)
class Run:
    """One file of results.

    Attributes:
        name: The file's stem, which is the suite's name.
        date: When it ran, ISO 8601.
        commit: Of the checkout, if it ran in one.
        machine: `None` if the file has no record of it.
        cases: In the file's order.
    """

    name: str
    date: str | None
    commit: str | None
    machine: Machine | None
    cases: tuple[Case, ...]

    def of_kind(self, *kinds: str) -> list[Case]:
        """The cases of some kinds."""
        return [case for case in self.cases if case.kind in kinds]


def load(path: Path) -> Run:
    """Read what a suite of `bench/` left behind.

    Raises:
        ReportError: The file cannot be read, or a field is missing or wrong; it names both.
    """
    content = parse(dict, read_json(path), path.name)
    machine: Machine | None = None
    cases = []
    for number, benchmark in enumerate(member(list, content, "benchmarks", path.name)):
        where = f"{path.name}.benchmarks[{number}]"
        info = parse(dict, benchmark, where).get("extra_info") or {}
        where += ".extra_info"
        if "kind" not in info:  # a benchmark that is not for this report
            continue
        if info["kind"] == "machine":
            machine = parse(Machine, info, where)
        else:
            cases.append(_case(info, where))
    if not cases:
        raise ReportError(f"{path.name} holds no benchmark with results: run the suite to its end.")
    commit = (content.get("commit_info") or {}).get("id")
    date = parse(str | None, content.get("datetime"), f"{path.name}.datetime")
    if commit == "unversioned":  # an installed package, run from a folder that is no checkout
        commit = None
    return Run(path.stem, date, commit, machine, tuple(cases))


def _case(info: Mapping[str, Any], where: str) -> Case:
    records = member(Mapping[str, dict[str, Any]], info, "methods", where)
    known = {name: one for name, one in records.items() if _is_measured(one)}
    dense = next((one["ms"] for one in known.values() if one.get("role") == "dense"), math.nan)
    methods = {
        name: _method(name, one, f"{where}.methods.{name}", dense) for name, one in known.items()
    }
    unmeasured = tuple(name for name in records if name not in known)
    case: Case = parse(Case, info, where, methods=methods, unmeasured=unmeasured)
    # A step or a row pass may have no such size.
    for name in "mnpk" if case.kind in WEIGHT_GRAD_KINDS else "":
        if getattr(case, name) == 0:
            raise ReportError(f"{where}.{name} is 0: a whole number from 1 is wanted.")
    return case


def _is_measured(record: Mapping[str, Any]) -> bool:
    """Whether a time is there: some writers spell NaN as null."""
    times = [record.get(name, 1.0) for name in ("ms", "q1", "q3")]
    return all(one is not None and one not in (math.inf, 0) and one == one for one in times)


def _method(name: str, info: Mapping[str, Any], where: str, dense_ms: float) -> Method:
    ms = Spread(*(member(float, info, part, where) for part in ("ms", "q1", "q3")))
    if info.get("speedup") is not None or info.get("role") in ("ours", "baseline"):
        speedup = member(Spread, info, "speedup", where)
    else:
        speedup = Spread(*[dense_ms / ms.median] * 3)
    cold = None
    if info.get("cold") is not None:
        cold = member(Spread, member(dict, info, "cold", where), "speedup", f"{where}.cold")
    method: Method = parse(Method, info, where, name=name, ms=ms, speedup=speedup, cold=cold)
    return method
