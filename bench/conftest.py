"""Ratios measured in one run, beside pytest-benchmark's own timings.

Machines drift, so a time is only worth something beside another one taken in the same minute. Every
comparison alternates blocks of calls, dense and ours, and reports the median of the block ratios
with its quartiles. Consecutive calls find in the cache what fits there; the cold ratio has the
caches flushed before every call, as when the rest of a large model runs in between.
"""

import platform
import statistics
import time

import pytest
import torch

THREADS = 2
ROUNDS = 9
COLD_ROUNDS = 7


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def block(call, calls):
    call()
    return statistics.median(seconds(call) for _ in range(calls))


def summary(values):
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "q1": low, "q3": high}


class Comparison:
    """Times one call against a baseline and records the ratio in the benchmark's extra_info."""

    def __init__(self, benchmark, rows):
        self.benchmark = benchmark
        self.rows = rows

    def __call__(self, name, baseline, call, *, limit=None, target=None):
        """`limit`: a call that does nothing but the traffic and FLOPs nobody can avoid."""
        pairs = [(block(baseline, 3), block(call, 7)) for _ in range(ROUNDS)]
        flush = torch.ones(64 << 20)
        cold = []
        for _ in range(COLD_ROUNDS):
            flush.add_(1)
            dense = seconds(baseline)
            flush.add_(1)
            cold.append(dense / seconds(call))
        info = {
            "baseline_ms": 1e3 * statistics.median(b for b, _ in pairs),
            "ours_ms": 1e3 * statistics.median(o for _, o in pairs),
            "ratio": summary([b / o for b, o in pairs]),
            "ratio_cold": summary(cold),
            "target": target,
            "threads": THREADS,
            "torch": torch.__version__,
            "processor": platform.processor() or platform.machine(),
        }
        if limit is not None:
            floors = [block(limit, 7) for _ in range(ROUNDS)]
            info["limit_ms"] = 1e3 * statistics.median(floors)
        self.benchmark.extra_info.update(info)
        self.rows.append((name, info))
        self.benchmark.pedantic(call, rounds=5, warmup_rounds=1)


def pytest_configure(config):
    config.memaop_rows = []


@pytest.fixture
def compare(benchmark, request):
    return Comparison(benchmark, request.config.memaop_rows)


def pytest_terminal_summary(terminalreporter, config):
    if not config.memaop_rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section(f"ratio to dense, median [quartiles], {THREADS} threads, float32")
    head = ("dense ms", "ours ms", "limit ms", "of limit", "ratio", "[q1, q3]", "wanted", "cold")
    write(f"{'':44s}" + "".join(f"{h:>10s}" if h[0] != "[" else f"{h:>15s}" for h in head))
    for name, info in config.memaop_rows:
        ratio, cold, target = info["ratio"], info["ratio_cold"], info["target"]
        limit = info.get("limit_ms")
        cells = [
            f"{info['baseline_ms']:10.2f}",
            f"{info['ours_ms']:10.2f}",
            f"{limit:10.2f}" if limit else f"{'':10s}",
            f"{limit / info['ours_ms']:10.2f}" if limit else f"{'':10s}",
            f"{ratio['median']:10.2f}",
            f"{'[{q1:.2f}, {q3:.2f}]'.format(**ratio):>15s}",
            f"{target:10.1f}" if target else f"{'':10s}",
            f"{cold['median']:10.2f}",
        ]
        write(f"{name:44s}" + "".join(cells))
