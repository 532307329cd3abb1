"""Results as the suites of `bench/` leave them, made up: dense takes 80 ms, whatever the shape."""

from typing import Any

DENSE, LIMIT = 80.0, 9.9
OURS = {"default": 10.8, "priority": 10.0, "topk": 10.5, "topk-residual": 10.9}
BASELINES = {"authors": 160.0, "crs": 20.0, "vcas": 12.0}
GFLOPS, READ_GBS, UPDATE_GBS = 200.0, 14.0, 11.0
Record = dict[str, Any]
MACHINE: Record = {
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


def results(cases: list[Record], machine: Record | None = MACHINE) -> Record:
    """The content of a file."""
    infos = cases if machine is None else [machine, *cases]
    commit = "unversioned" if machine is None else "eaf524b0f0f0"
    return {
        "datetime": "2025-11-25T21:30:00.000000+00:00",
        "commit_info": {"id": commit},
        "benchmarks": [{"name": f"test[{i}]", "extra_info": info} for i, info in enumerate(infos)],
    }


def spread(median: float) -> Record:
    """Its quartiles lie 2 % of the median away."""
    return {"median": median, "q1": 0.98 * median, "q3": 1.02 * median}


def method(name: str, role: str, ms: float) -> Record:
    """One method's numbers."""
    times = spread(ms)
    return {
        "role": role,
        "label": name,
        "ms": ms,
        "q1": times["q1"],
        "q3": times["q3"],
        "speedup": spread(DENSE / ms),
        "peak_bytes": 4 << 20,
    }


def weight_grad(kind: str, m: int, n: int, p: int, ratio: float) -> Record:
    """A case in which ours beats everything."""
    methods = [method("dense", "dense", DENSE), method("limit", "limit", LIMIT)]
    methods += [method(name, "ours", ms) for name, ms in OURS.items()]
    methods += [method(name, "baseline", ms) for name, ms in BASELINES.items()]
    return {
        "kind": kind,
        "title": f"{kind} {m}x{n}x{p} r={ratio:g}",
        "m": m,
        "n": n,
        "p": p,
        "k": max(1, round(ratio * m)),
        "ratio": ratio,
        "dtype": "float32",
        "device": "cpu",
        "block_rows": 1,
        "methods": {one["label"]: one for one in methods},
    }


def step(title: str, speeds: dict[str, float], wanted: dict[str, float] | None = None) -> Record:
    """A whole training step."""
    methods = {"dense": method("dense", "dense", DENSE)}
    methods |= {name: method(name, "ours", DENSE / speed) for name, speed in speeds.items()}
    changes = {"title": title, "model": title, "wanted": wanted or {}, "methods": methods}
    return weight_grad("step", 8192, 1024, 1024, 1 / 8) | changes
