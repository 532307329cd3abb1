"""The benchmarks' JSON file as dataclasses.

Times are in milliseconds, rates in GB/s and GFLOP/s, memory in bytes. A speed-up is dense's time
over a method's time, taken per round, so that the machine's drift cancels.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memaop_triton.errors import CommandError

# Kinds whose calls compute one weight gradient, and nothing else.
WEIGHT_GRAD_KINDS = ("dw", "sweep_rows", "sweep_ratio", "sweep_width", "overhead")


class ReportError(CommandError):
    """A file of results is missing or is not what the benchmarks write."""


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
        role: `dense`, `ours`, `baseline` or `limit`.
        label: Its name for readers.
        ms: Milliseconds of a call.
        speedup: Dense's time over this one's.
        peak_bytes: Memory that a call holds at most beside its operands.
        cold: The speed-up with cold caches; `None` if not measured.
        saved_bytes: Held between forward and backward pass. This and what follows is of cases of
            the kind `memory` only.
        resident_bytes: Parameters, gradients and the optimizer's state.
        batch_bytes: The most that forward and backward pass hold beside these.
        small_batch_bytes: The same with a smaller batch.
        small_ms: Milliseconds of a step with that.
    """

    name: str
    role: str
    label: str
    ms: Spread
    speedup: Spread
    peak_bytes: int
    cold: Spread | None = None
    saved_bytes: int = 0
    resident_bytes: int = 0
    batch_bytes: int = 0
    small_batch_bytes: int = 0
    small_ms: float = 0.0


@dataclass(frozen=True)
class Case:
    """One shape and ratio, and every method timed on it in turn.

    Attributes:
        kind: What was timed: one of `WEIGHT_GRAD_KINDS`, `kernel`, `layer`, `step` or `memory`.
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
        wanted: The target speed-up, by method.
        samples: Of a batch, where the kind is `memory`.
        small_samples: Of the smaller one.
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
    samples: int = 0
    small_samples: int = 0

    def of_role(self, role: str) -> list[Method]:
        """Its methods of one role."""
        return [method for method in self.methods.values() if method.role == role]

    @property
    def dense(self) -> Method:
        """The dense call."""
        return self.of_role("dense")[0]

    @property
    def limit(self) -> Method | None:
        """The work that no method can avoid, `None` if it was not measured."""
        return next(iter(self.of_role("limit")), None)

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
    threads: int
    cores: int
    gemm_gflops: Mapping[str, float]
    stream_gbs: float
    triad_gbs: float
    caches: Mapping[str, str]
    versions: Mapping[str, str | None]
    clocks: str | None = None
    load_before: float | None = None


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
    date: str
    commit: str | None
    machine: Machine | None
    cases: tuple[Case, ...]

    def of_kind(self, *kinds: str) -> list[Case]:
        """The cases of some kinds."""
        return [case for case in self.cases if case.kind in kinds]


def load(path: Path) -> Run:
    """Read what a suite of `bench/` left behind.

    Raises:
        ReportError: The file cannot be read, or is not what a suite leaves behind.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        infos = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
        machines = [_made(Machine, info) for info in infos if info["kind"] == "machine"]
        cases = tuple(_case(info) for info in infos if info["kind"] != "machine")
        commit = content["commit_info"]["id"]
        date = content["datetime"]
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}.") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{path} is not what the benchmarks write: {error!r}.") from None
    if not cases:
        raise ReportError(f"{path} holds no benchmark with results: run the suite to its end.")
    if commit == "unversioned":  # an installed package, run from a folder that is no checkout
        commit = None
    return Run(path.stem, date, commit, machines[0] if machines else None, cases)


def _case(info: Mapping[str, Any]) -> Case:
    methods = {name: _method(name, one) for name, one in info["methods"].items()}
    case: Case = _made(Case, info, methods=methods)
    return case


def _method(name: str, info: Mapping[str, Any]) -> Method:
    ms = Spread(info["ms"], info["q1"], info["q3"])
    speedup = Spread(**info["speedup"])
    cold = Spread(**info["cold"]["speedup"]) if "cold" in info else None
    method: Method = _made(Method, info, name=name, ms=ms, speedup=speedup, cold=cold)
    return method


def _made(kind: Any, info: Mapping[str, Any], **given: Any) -> Any:
    """A dataclass from what `info` has of its fields, and from those given."""
    found = {one.name: info[one.name] for one in dataclasses.fields(kind) if one.name in info}
    return kind(**found | given)
