"""Results as the suites of `bench/` leave them, made up by a model of a machine."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

GFLOPS, READ_GBS, UPDATE_GBS = 200.0, 14.0, 11.0
OURS = {"default": 1.5, "priority": 1.0, "topk": 1.0, "topk-residual": 3.0, "topk-signed": 3.0}
# How many passes' worth of work a baseline does, and how well its GEMM runs.
BASELINES = {
    "authors": (14.0, 0.4),
    "crs": (2.6, 0.9),
    "bernoulli-crs": (4.0, 0.6),
    "vcas": (1.5, 0.95),
    "wta-crs": (3.0, 0.9),
}
RATIOS = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
Record = dict[str, Any]


def results(cases: list[Record], machine: Record | None = None) -> Record:
    """The content of a file."""
    infos = cases if machine is None else [machine, *cases]
    return {
        "datetime": "2025-11-25T21:30:00.000000+00:00",
        "commit_info": {"id": "eaf524b0f0f0"},
        "benchmarks": [{"name": f"test[{i}]", "extra_info": info} for i, info in enumerate(infos)],
    }


def save(path: Path, content: Record) -> Path:
    """Write it, and return the path."""
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def machine(**changes: Any) -> Record:
    """A record of a small server."""
    record = {
        "kind": "machine",
        "name": "Example CPU @ 2.80GHz",
        "threads": 2,
        "cores": 2,
        "gemm_gflops": {"float32": GFLOPS},
        "stream_gbs": READ_GBS,
        "triad_gbs": UPDATE_GBS,
        "caches": {"L1d": "32 KiB", "L2": "1 MiB", "L3": "33 MiB"},
        "versions": {"torch": "2.13.0", "triton": "3.7.1", "python": "3.11.2", "blas": "mkl"},
        "load_before": 0.12,
    }
    return record | changes


def method(
    name: str, role: str, ms: float, dense_ms: float, spread: float = 0.02, **more: Any
) -> Record:
    """One method's numbers; its quartiles lie `spread` of the median away."""
    speed = dense_ms / ms
    return {
        "role": role,
        "label": name,
        "ms": ms,
        "q1": ms * (1 - spread),
        "q3": ms * (1 + spread),
        "speedup": {"median": speed, "q1": speed * (1 - spread), "q3": speed * (1 + spread)},
        "peak_bytes": 4 << 20,
    } | more


def weight_grad(kind: str, m: int, n: int, p: int, ratio: float) -> Record:
    """A case in which every method takes what the machine's rates say, give or take 3 %."""
    noise = random.Random(f"{kind} {m} {n} {p} {ratio}")

    def jitter() -> float:
        return noise.uniform(0.97, 1.03)

    k = max(1, round(ratio * m))
    one_pass = 4e3 * m * (n + p) / (READ_GBS * 1e9)
    product = 2e3 * m * n * p / (GFLOPS * 1e9)
    dense_ms = (product + 0.004) * jitter()
    methods = {"dense": method("dense", "dense", dense_ms, dense_ms)}
    for name, units in OURS.items():
        ms = ((units * one_pass + k / m * product) * 1.06 + 0.045) * jitter()
        methods[name] = method(name, "ours", ms, dense_ms)
    for name, (units, rate) in BASELINES.items():
        ms = (units * one_pass + k / m * product / rate + 0.03) * jitter()
        methods[name] = method(name, "baseline", ms, dense_ms, peak_bytes=90 << 20)
    methods["limit"] = method("limit", "limit", one_pass + k / m * product, dense_ms)
    return {
        "kind": kind,
        "title": f"{kind} {m}x{n}x{p} r={ratio:g}",
        "m": m,
        "n": n,
        "p": p,
        "k": k,
        "ratio": ratio,
        "dtype": "float32",
        "device": "cpu",
        "block_rows": 1,
        "methods": methods,
    }


def step(title: str, speeds: dict[str, float], wanted: dict[str, float] | None = None) -> Record:
    """A whole training step."""
    methods = {"dense": method("dense", "dense", 10.0, 10.0)}
    methods |= {name: method(name, "ours", 10.0 / speed, 10.0) for name, speed in speeds.items()}
    changes = {"title": title, "model": title, "wanted": wanted or {}, "methods": methods}
    return weight_grad("step", 8192, 1024, 1024, 1 / 8) | changes


def markdown_tables(markdown: str) -> list[list[list[str]]]:
    """Every table of a Markdown text as a list of rows of cells."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", markdown, flags=re.MULTILINE)
    return [
        [re.split(r"(?<!\\) ?\| ?", line)[1:-1] for line in block.splitlines()] for block in blocks
    ]
