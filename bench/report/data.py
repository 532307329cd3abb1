"""The benchmarks' JSON file as dataclasses.

Times are in milliseconds, rates in GB/s and GFLOP/s, memory in bytes. A speed-up is dense's time
over a method's time, taken per round, so that the machine's drift cancels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from memaop_triton.bench.report.fields import Fields, ReportError, read_json

KINDS = (
    "kernel",
    "dw",
    "layer",
    "step",
    "sweep_rows",
    "sweep_ratio",
    "sweep_width",
    "overhead",
)  # fmt: skip
ROLES = ("dense", "ours", "baseline", "limit")
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
        role: One of `ROLES`.
        label: Its name for readers.
        ms: Milliseconds of a call.
        speedup: Dense's time over this one's; of the medians, without a spread, if a limit or the
            dense call came without.
        peak_bytes: Memory that a call holds at most beside its operands; `None` if not measured.
        note: What a reader has to know about this number.
        cold: The speed-up with cold caches; `None` if not measured.
    """

    name: str
    role: str
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
        kind: One of `KINDS`.
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

    kind: str
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
        clocks: As the machine told them.
        load_before: Load average before the run.
    """

    name: str
    threads: int | None = None
    cores: int | None = None
    gemm_gflops: Mapping[str, float] = field(default_factory=dict)
    stream_gbs: float | None = None
    triad_gbs: float | None = None
    caches: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    clocks: str | None = None
    load_before: str | None = None


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
    content = read_json(path)
    machine: Machine | None = None
    cases = []
    for benchmark in content.objects("benchmarks"):
        if "extra_info" not in benchmark:
            continue
        info = benchmark.object("extra_info")
        if "kind" not in info:  # a benchmark that is not for this report
            continue
        if info.text("kind") == "machine":
            machine = _machine(info)
        else:
            cases.append(_case(info))
    if not cases:
        raise ReportError(f"{path.name} holds no benchmark with results: run the suite to its end.")
    commit = content.optional_object("commit_info").optional_text("id")
    if commit == "unversioned":  # an installed package, run from a folder that is no checkout
        commit = None
    return Run(path.stem, content.optional_text("datetime"), commit, machine, tuple(cases))


def _machine(info: Fields) -> Machine:
    rates = info.optional_object("gemm_gflops")
    plain = info.plain()
    return Machine(
        name=info.text("name"),
        threads=info.optional_integer("threads"),
        cores=info.optional_integer("cores"),
        gemm_gflops={dtype: rates.positive(dtype) for dtype in rates.names() if dtype in rates},
        stream_gbs=info.optional_positive("stream_gbs"),
        triad_gbs=info.optional_positive("triad_gbs"),
        caches=info.optional_object("caches").plain(),
        versions=info.optional_object("versions").plain(),
        clocks=plain.get("clocks"),
        load_before=plain.get("load_before"),
    )


def _case(info: Fields) -> Case:
    kind = _one_of(info, "kind", KINDS)
    least = 1 if kind in WEIGHT_GRAD_KINDS else 0  # a step or a row pass may have no such size
    methods = info.object("methods")
    times = {name: methods.object(name) for name in methods.names()}
    known = {name: one for name, one in times.items() if _is_measured(one)}
    dense = [one.positive("ms") for one in known.values() if one.text("role") == "dense"]
    wanted = info.optional_object("wanted")
    return Case(
        kind=kind,
        title=info.text("title"),
        m=info.integer("m", least),
        n=info.integer("n", least),
        p=info.integer("p", least),
        k=info.integer("k", least),
        ratio=info.positive("ratio"),
        dtype=info.text("dtype"),
        device=info.text("device"),
        block_rows=info.integer("block_rows"),
        methods={
            name: _method(name, one, dense[0] if dense else None) for name, one in known.items()
        },
        model=info.optional_text("model"),
        wanted={name: wanted.positive(name) for name in wanted.names() if name in wanted},
        unmeasured=tuple(name for name in times if name not in known),
    )


def _is_measured(method: Fields) -> bool:
    return all(_finite(method.number(name)) for name in ("ms", "q1", "q3"))


def _finite(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _method(name: str, info: Fields, dense_ms: float | None) -> Method:
    ms = Spread(info.positive("ms"), info.positive("q1"), info.positive("q3"))
    role = _one_of(info, "role", ROLES)
    if "speedup" in info or role in ("ours", "baseline"):
        speedup = _spread(info.object("speedup"))
    else:
        middle = math.nan if dense_ms is None else dense_ms / ms.median
        speedup = Spread(middle, middle, middle)
    return Method(
        name=name,
        role=role,
        label=info.text("label"),
        ms=ms,
        speedup=speedup,
        peak_bytes=info.optional_integer("peak_bytes"),
        note=info.optional_text("note"),
        cold=_spread(info.object("cold").object("speedup")) if "cold" in info else None,
    )


def _spread(info: Fields) -> Spread:
    return Spread(info.positive("median"), info.positive("q1"), info.positive("q3"))


def _one_of(info: Fields, name: str, allowed: Iterable[str]) -> str:
    value = info.text(name)
    if value not in allowed:
        wanted = ", ".join(allowed)
        raise ReportError(f"{info.where}.{name} is {value!r}: one of {wanted} is wanted.")
    return value
