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
    noise = random.Random(f"0 {kind} {m} {n} {p} {ratio}")

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


def step(model: str, dense_ms: float, speeds: dict[str, float], wanted: dict[str, float]) -> Record:
    """A whole training step, or a layer if `model` says so."""
    kind = "layer" if model.startswith("layer") else "step"
    case = weight_grad("dw", 8192, 1024, 1024, 1 / 8)
    methods = {"dense": method("dense", "dense", dense_ms, dense_ms)}
    for name, speed in speeds.items():
        role = "baseline" if name in BASELINES else "ours"
        methods[name] = method(name, role, dense_ms / speed, dense_ms, 0.03)
    changes = {"kind": kind, "title": f"{model}, r=1/8", "model": model, "wanted": wanted}
    return case | changes | {"methods": methods}


def every_case() -> list[Record]:
    """All kinds, some of them lost."""
    shapes = [(8192, 1024, 1024), (4096, 2048, 2048), (16384, 768, 3072), (2048, 512, 512)]
    dw = [weight_grad("dw", *s, r) for s in shapes for r in (1 / 4, 1 / 8, 1 / 16)]
    dw[1]["wanted"] = {"default": 4.0, "priority": 6.5}
    ratios = [weight_grad("sweep_ratio", 8192, 1024, 1024, r) for r in RATIOS]
    ratios += [weight_grad("sweep_ratio", 4096, 2048, 2048, r) for r in RATIOS]
    widths = [weight_grad("sweep_width", 4096, 2**i, 2**i, 1 / 8) for i in range(6, 12)]
    sweep = [weight_grad("sweep_rows", 2**i, 512, 512, 1 / 8) for i in range(9, 18)]
    small = weight_grad("overhead", 64, 64, 64, 1 / 8)
    mlp = {"default": 1.33, "default, sampled dX": 1.86, "priority": 1.36, "vcas": 1.29}
    steps = [
        step("layer 8192x1024x1024", 180, {"default": 1.31, "default, sampled dX": 2.05}, {}),
        step("MLP 1024", 950, mlp, {"default": 1.3, "default, sampled dX": 1.9}),
        step("GPT block", 620, {"default": 1.22, "priority": 1.24}, {"default": 1.2}),
        step("ViT block", 540, {"default": 1.17, "priority": 1.23}, {"default": 1.2}),
    ]
    kernel = weight_grad("kernel", 8192, 1024, 1024, 1 / 8)
    kernel |= {"title": "row norms, 8192x1024", "methods": {
        "dense": method("dense", "dense", 4.2, 4.2, label="square().sum(1)"),
        "rows.c": method("rows.c", "ours", 2.4, 4.2, label="one pass in C"),
    }}  # fmt: skip
    return [*dw, *ratios, *widths, *sweep, *steps, kernel, small]


def markdown_tables(markdown: str) -> list[list[list[str]]]:
    """Every table of a Markdown text as a list of rows of cells."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", markdown, flags=re.MULTILINE)
    return [
        [re.split(r"(?<!\\) ?\| ?", line)[1:-1] for line in block.splitlines()] for block in blocks
    ]
