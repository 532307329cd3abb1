"""How the benchmarks take times: fake clocks for the arithmetic, real calls for the memory."""

import json
import statistics

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
        times = [call() for _ in range(calls)]
        self.log.append((call.name, calls))
        return statistics.mean(times)

    def cold_seconds(self, call):
        return 10 * call()

    def peak_bytes(self, call):
        return call.bytes


class FakeCall:
    def __init__(self, name, times, size=0):
        self.name, self.times, self.bytes, self.count = name, times, size, 0

    def __call__(self):
        self.count += 1
        return self.times[self.count % len(self.times)]


def methods(*calls, **fields):
    return [
        Method(call.name, "dense" if call.name == "dense" else "ours", call.name, call, **fields)
        for call in calls
    ]


def test_quartiles_of_ratios_per_round():
    dense = FakeCall("dense", [0.4, 0.8], size=8)
    ours = FakeCall("ours", [0.1], size=5)
    result = measure.compare(methods(dense, ours), FakeClock(), budget=0)
    assert result["dense"]["speedup"] == {"median": 1, "q1": 1, "q3": 1}
    # Rounds of dense alternate between 0.4 and 0.8 s; five of them were taken.
    assert result["ours"]["rounds"] == measure.FEWEST_ROUNDS == 5
    assert result["ours"]["speedup"]["median"] in (pytest.approx(4), pytest.approx(8))
    assert result["ours"]["speedup"]["q1"] == pytest.approx(4)
    assert result["ours"]["speedup"]["q3"] == pytest.approx(8)
    assert result["ours"]["ms"] == pytest.approx(100)
    assert (result["dense"]["q1"], result["dense"]["q3"]) == pytest.approx((400, 800))
    assert (result["dense"]["peak_bytes"], result["ours"]["peak_bytes"]) == (8, 5)


def test_every_round_has_every_method_in_changing_order():
    clock = FakeClock()
    calls = [FakeCall(name, [0.1]) for name in ("dense", "a", "b", "c")]
    measure.compare(methods(*calls), clock, budget=0)
    rounds = [name for name, _ in clock.log][-4 * measure.FEWEST_ROUNDS :]
    orders = [tuple(rounds[start : start + 4]) for start in range(0, len(rounds), 4)]
    assert all(sorted(order) == ["a", "b", "c", "dense"] for order in orders)
    assert len(set(orders)) > 1


def test_a_refresh_counts_its_share():
    often = FakeCall("ours", [0.0001] * 7 + [0.0009])
    clock = FakeClock()
    result = measure.compare(methods(FakeCall("dense", [0.0002]), often, period=8), clock, 1)
    assert result["ours"]["calls"] % 8 == 0
    assert result["ours"]["ms"] == pytest.approx(0.2)


def test_short_calls_are_timed_many_at_once_and_long_ones_alone():
    short, long = FakeCall("dense", [1e-5]), FakeCall("ours", [0.1])
    result = measure.compare(methods(short, long), FakeClock(), budget=1)
    assert result["dense"]["calls"] == 200
    assert result["ours"]["calls"] == 1


def test_rounds_fill_the_budget(monkeypatch):
    now = [0.0]

    def tick():
        now[0] += 0.5
        return now[0]

    monkeypatch.setattr(measure.time, "perf_counter", tick)
    calls = methods(FakeCall("dense", [0.1]), FakeCall("ours", [0.1]))
    assert measure.compare(calls, FakeClock(), budget=0)["dense"]["rounds"] == 5
    assert measure.compare(calls, FakeClock(), budget=5)["dense"]["rounds"] == 10
    assert measure.compare(calls, FakeClock(), budget=1e9)["dense"]["rounds"] == 41


def test_cold_rounds():
    calls = methods(FakeCall("dense", [0.4]), FakeCall("ours", [0.1]))
    result = measure.compare(calls, FakeClock(), budget=0, cold=True)
    assert result["ours"]["cold"]["ms"] == pytest.approx(1000)
    assert result["ours"]["cold"]["speedup"]["median"] == pytest.approx(4)
    assert "cold" not in measure.compare(calls, FakeClock(), budget=0)["ours"]


@pytest.mark.parametrize("names", [("ours",), ("dense", "dense"), ("dense", "ours", "ours")])
def test_one_dense_and_one_of_each_name(names):
    with pytest.raises(ValueError, match="dense"):
        measure.compare(methods(*(FakeCall(n, [0.1]) for n in names)), FakeClock(), budget=0)


def test_peak_memory_of_a_call():
    held = torch.zeros(1 << 20)

    def call():
        first = torch.empty(3 << 20)
        second = torch.empty(2 << 20)
        del first
        third = torch.empty(1 << 20)
        return held, second, third

    assert CLOCK.peak_bytes(call) == 4 * (5 << 20)


def test_peak_memory_of_a_backward_pass_inside_operators():
    problem = Problem(4096, 64, 64)
    dense, ours = contenders.layers(problem, [("priority", "exact")])
    ours.call()
    output = 4 * problem.m * problem.p
    gathered = 4 * problem.k * (problem.n + problem.p)
    assert output <= CLOCK.peak_bytes(dense.call)
    assert output <= CLOCK.peak_bytes(ours.call) < 2 * output + gathered + (1 << 20)


@pytest.mark.parametrize("memory", contenders.FAMILIES)
def test_every_family_has_dense_ours_a_baseline_and_one_limit(memory):
    family = contenders.family(Problem(64, 16, 16), memory)
    roles = [method.role for method in family]
    assert roles.count("dense") == roles.count("limit") == 1
    assert {"ours", "baseline"} <= set(roles)
    for method in family:
        assert method.call().shape == (16, 16)


@pytest.mark.parametrize(
    ("memory", "rows"), [("none", 64), ("residual", 64), ("subspace", 64 + 128)]
)
def test_the_limit_counts_the_rows_of_the_design(memory, rows, monkeypatch):
    # M q (N + P)/(N P) = 512 · 8 · 128/(64 · 64) = 128 for q = 8
    problem = Problem(512, 64, 64)
    monkeypatch.setattr(contenders.MemAOPConfig, "rank_for", lambda config, *sizes: 8)
    limit = contenders.limit(memory, problem, *problem.operands())
    with FlopCounterMode(display=False) as flops:
        limit.call()
    assert flops.get_total_flops() == 2 * rows * 64 * 64


def test_a_network_of_each_kind_takes_a_step():
    nets = [
        models.mlp(16, 8, depth=1),
        models.gpt_block(64, tokens=4, batch=2),
        models.vit_block(64, batch=2, tokens=5),
    ]
    for net in nets:
        model = net.make()
        before = [p.detach().clone() for p in model.parameters()]
        step = models.TrainingStep(net, model, "cpu", torch.float32)
        assert step().isfinite()
        assert all((p != q).any() for p, q in zip(model.parameters(), before, strict=True))
        assert (step.x.grad is not None) == net.is_inner


def test_only_a_gpt_block_is_causal():
    x = torch.randn(1, 6, 64)
    later = x.clone()
    later[:, 4:] = torch.randn(1, 2, 64)
    for net, sees_later in (
        (models.gpt_block(64, 6, 1), False),
        (models.vit_block(64, 1, 6), True),
    ):
        model = net.make()
        changed = not torch.allclose(model(x)[:, :4], model(later)[:, :4], atol=1e-5)
        assert changed == sees_later


def test_machine_is_described():
    info = machine.describe(
        torch.device("cpu"), dtypes=(torch.float32,), size=32, stream_bytes=1 << 16
    )
    assert info == json.loads(json.dumps(info))
    assert info["kind"] == "machine"
    assert info["name"]
    assert info["gemm_gflops"]["float32"] > 0
    assert info["stream_gbs"] > 0
    assert info["triad_gbs"] > 0
    assert {"memaop_triton", "python", "torch", "triton", "blas"} <= set(info["versions"])


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (lambda d: machine.gemm_gflops(d, torch.float32, 1000), 2.0),
        (lambda d: machine.stream_gbs(d, 4 << 20), (4 << 20) / 1e9),
        (lambda d: machine.triad_gbs(d, 8 << 20), 3 * (4 << 20) / 1e9),
    ],
    ids=["gemm", "stream", "triad"],
)
def test_rates_are_work_over_time(rate, expected, monkeypatch):
    monkeypatch.setattr(machine, "_median_seconds", lambda device, call: 1.0)
    assert rate(torch.device("cpu")) == pytest.approx(expected)


def test_folder_name():
    assert machine.folder_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
