"""How the benchmarks take times: fake clocks for the arithmetic, real calls for the memory."""

import itertools
import json
import statistics
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from memaop_triton.bench import machine, measure
from memaop_triton.bench.measure import Method
from memaop_triton.bench.suites import contenders, models
from memaop_triton.bench.suites.problem import Problem

CLOCK = measure.clock_for(torch.device("cpu"))


class FakeClock:
    """Calls tell what they took; time passes by what is asked."""

    def __init__(self):
        self.log = []

    def seconds(self, call, calls):
        self.log.append(call.name)
        return statistics.mean(call() for _ in range(calls))

    def cold_seconds(self, call):
        return 10 * call()

    def peak_bytes(self, call):
        return len(call.name)


class FakeCall:
    def __init__(self, name, times):
        self.name, self.times, self.count = name, times, 0

    def __call__(self):
        self.count += 1
        return self.times[self.count % len(self.times)]


def compare(budget=0.0, *, clock=None, cold=False, period=1, **times):
    """Compare calls of these names that take these seconds, again and again."""
    methods = [
        Method(name, "dense" if name == "dense" else "ours", name, FakeCall(name, took), period)
        for name, took in times.items()
    ]
    return measure.compare(methods, clock or FakeClock(), budget, cold=cold)


def test_quartiles_of_ratios_per_round():
    result = compare(dense=[0.4, 0.8], ours=[0.1])
    assert result["dense"]["speedup"] == {"median": 1, "q1": 1, "q3": 1}
    # Rounds of dense alternate between 0.4 and 0.8 s; five of them were taken.
    assert result["ours"]["rounds"] == measure.FEWEST_ROUNDS == 5
    speedup = result["ours"]["speedup"]
    assert (speedup["q1"], speedup["q3"]) == pytest.approx((4, 8))
    assert speedup["median"] in (pytest.approx(4), pytest.approx(8))
    assert result["ours"]["ms"] == pytest.approx(100)
    assert (result["dense"]["q1"], result["dense"]["q3"]) == pytest.approx((400, 800))
    assert (result["dense"]["peak_bytes"], result["ours"]["peak_bytes"]) == (5, 4)
    assert "cold" not in result["ours"]
    cold = compare(cold=True, dense=[0.4], ours=[0.1])["ours"]["cold"]
    assert (cold["ms"], cold["speedup"]["median"]) == pytest.approx((1000, 4))


def test_every_round_has_every_method_in_changing_order():
    clock = FakeClock()
    compare(clock=clock, dense=[0.1], a=[0.1], b=[0.1], c=[0.1])
    rounds = clock.log[-4 * measure.FEWEST_ROUNDS :]
    orders = [tuple(rounds[start : start + 4]) for start in range(0, len(rounds), 4)]
    assert all(sorted(order) == ["a", "b", "c", "dense"] for order in orders)
    assert len(set(orders)) > 1


def test_short_calls_are_timed_many_at_once_and_a_refresh_counts_its_share():
    result = compare(1, period=8, dense=[0.1], ours=[0.0001] * 7 + [0.0009])
    assert (result["dense"]["calls"], result["ours"]["calls"] % 8) == (1, 0)
    assert result["ours"]["ms"] == pytest.approx(0.2)
    assert compare(1, dense=[1e-5])["dense"]["calls"] == 200


def test_rounds_fill_the_budget(monkeypatch):
    now = [0.0]

    def tick():
        now[0] += 0.5
        return now[0]

    monkeypatch.setattr(measure.time, "perf_counter", tick)
    for budget, rounds in ((0, 5), (5, 10), (1e9, 41)):
        assert compare(budget, dense=[0.1], ours=[0.1])["dense"]["rounds"] == rounds


@pytest.mark.parametrize("names", [("ours",), ("dense", "dense"), ("dense", "ours", "ours")])
def test_one_dense_and_one_of_each_name(names):
    methods = [Method(name, name, name, lambda: 0.1) for name in names]
    with pytest.raises(ValueError, match="dense"):
        measure.compare(methods, FakeClock(), budget=0)


def test_peak_memory_of_a_call():
    held = torch.zeros(1 << 20)

    def call():
        first = torch.empty(3 << 20)
        second = torch.empty(2 << 20)
        del first
        third = torch.empty(1 << 20)
        return held, second, third

    assert CLOCK.peak_bytes(call) == 4 * (5 << 20)


def losing(monkeypatch, lost):
    """Let the profiler lose a slice of the events of the recordings that `lost` names."""
    recordings = iter(lost)

    class Profile(measure.profile):
        def __exit__(self, *error):
            super().__exit__(*error)
            events = [e for e in self.kineto_results.events() if e.name() == "[memory]"]
            kept = events[next(recordings, slice(None))]
            self.kineto_results = SimpleNamespace(events=lambda: kept)

    monkeypatch.setattr(measure, "profile", Profile)


@pytest.mark.parametrize("kept", [slice(0), slice(-1), slice(-2, None)])
def test_a_recording_that_lost_events_is_taken_again(monkeypatch, kept):
    losing(monkeypatch, [kept, kept])
    assert CLOCK.peak_bytes(lambda: torch.empty(1 << 20, dtype=torch.uint8)) == 1 << 20
    losing(monkeypatch, itertools.repeat(kept))
    with pytest.raises(RuntimeError, match="incomplete"):
        CLOCK.held_bytes(lambda: torch.empty(1 << 20, dtype=torch.uint8))


def test_peak_memory_of_a_backward_pass_inside_operators():
    problem = Problem(4096, 64, 64)
    dense, ours = contenders.layers(problem, [("priority", "exact")])
    ours.call()
    output = 4 * problem.m * problem.p
    gathered = 4 * problem.k * (problem.n + problem.p)
    assert output <= CLOCK.peak_bytes(dense.call)
    assert output <= CLOCK.peak_bytes(ours.call) < 2 * output + gathered + (1 << 20)


@pytest.mark.parametrize(
    ("memory", "rows"), [("none", 64), ("residual", 64), ("subspace", 64 + 128)]
)
def test_every_family_has_a_limit_of_the_rows_of_the_design(memory, rows, monkeypatch):
    # M q (N + P)/(N P) = 512 · 8 · 128/(64 · 64) = 128 for q = 8
    monkeypatch.setattr(contenders.MemAOPConfig, "rank_for", lambda config, *sizes: 8)
    family = contenders.family(Problem(512, 64, 64), memory)
    assert {method.role for method in family} == {"dense", "ours", "baseline", "limit"}
    assert all(method.call().shape == (64, 64) for method in family)
    (limit,) = [method for method in family if method.role == "limit"]
    with FlopCounterMode(display=False) as flops:
        limit.call()
    assert flops.get_total_flops() == 2 * rows * 64 * 64


@pytest.mark.parametrize(
    "net", [models.mlp(16, 8, depth=1), models.gpt_block(64, 4, 2), models.vit_block(64, 2, 5)]
)
def test_a_network_of_each_kind_takes_a_step(net):
    model = net.make()
    before = [p.detach().clone() for p in model.parameters()]
    step = models.TrainingStep(net, model, "cpu", torch.float32)
    assert step().isfinite()
    assert all((p != q).any() for p, q in zip(model.parameters(), before, strict=True))
    assert (step.x.grad is not None) == net.is_inner


def test_machine_is_described():
    info = machine.describe(
        torch.device("cpu"), dtypes=(torch.float32,), size=32, stream_bytes=1 << 16
    )
    assert info == json.loads(json.dumps(info))
    assert info["kind"] == "machine"
    assert info["name"]
    assert {"memaop_triton", "python", "torch", "triton", "blas"} <= set(info["versions"])
    assert machine.folder_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_rates_are_work_over_time(monkeypatch):
    monkeypatch.setattr(machine, "_median_seconds", lambda device, call: 1.0)
    cpu = torch.device("cpu")
    assert machine.gemm_gflops(cpu, torch.float32, 1000) == pytest.approx(2.0)
    assert machine.stream_gbs(cpu, 4 << 20) == pytest.approx((4 << 20) / 1e9)
    assert machine.triad_gbs(cpu, 8 << 20) == pytest.approx(3 * (4 << 20) / 1e9)
