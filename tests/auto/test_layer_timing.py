"""How the backward pass of a layer is timed."""

import itertools

import pytest
import torch

from memaop_triton import MemAOPConfig, MemAOPLinear, Subspace
from memaop_triton.auto import layer_timing, timing
from memaop_triton.auto.layer_timing import Use

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Replaces the clock: calls last as long as they return, and are recorded."""
    log = []

    def elapsed(call, device, repeats=1):
        log.append((call, repeats))
        return call()

    monkeypatch.setattr(timing, "elapsed", elapsed)
    return log


def test_calls_are_timed_in_turn_and_after_a_first_use(clock):
    def long():
        return 1.0

    def short():
        return timing.SHORTEST_SECONDS / 7.5

    times = timing.time_in_turn([long, short], CPU, budget=6.0)
    assert times == [[1.0] * 5, [timing.SHORTEST_SECONDS / 7.5] * 5]
    assert [call for call, _ in clock[:2]] == [long, short]
    rounds = clock[6:]
    assert [call for call, _ in rounds] == [long, short, short, long] * 2 + [long, short]
    assert dict(rounds) == {long: 1, short: 8}
    # Whatever the budget, there are bounds.
    assert len(timing.time_in_turn([long], CPU, 0.0)[0]) == 3
    assert len(timing.time_in_turn([long], CPU, 1e9)[0]) == 25


def test_elapsed_is_the_mean_of_the_repeats(monkeypatch):
    ticks = iter([10.0, 16.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    calls = []
    assert timing.elapsed(lambda: calls.append(1), CPU, repeats=3) == 2.0
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("memory", "ours", "held"),
    [
        (Subspace(refresh_every=4), 1.0 * 3 / 4 + 2.0 / 4, 2 * 8 * 2 * 4),
        (Subspace(refresh_every=1), 1.0, 2 * 8 * 2 * 4),
        ("none", 1.0, 0),
    ],
)
def test_a_refresh_counts_for_its_share_and_the_forward_pass_for_what_it_adds(
    monkeypatch, memory, ours, held
):
    def time_in_turn(calls, device, budget, shortest):
        for call in calls:
            call()
        return results.pop(0)[: len(calls)]

    results = [[[3.0, 4.0], [1.0, 1.0], [2.0, 2.0]], [[0.1, 0.2, 0.3], [0.5, 0.6, 0.7]]]
    monkeypatch.setattr(layer_timing, "time_in_turn", time_in_turn)
    config = MemAOPConfig(memory=memory)
    found = layer_timing.measure(Use(9, 8, 8, torch.float32, CPU), config, 1.0)
    assert found.dense == [3.0, 4.0]
    assert found.ours == pytest.approx([ours + 0.4] * 2)
    assert found.memory_bytes == held


def test_several_configurations_are_timed_beside_one_dense_layer(monkeypatch):
    def time_in_turn(calls, device, budget, shortest):
        assert shortest == 1e-4
        return [[float(number)] * 2 for number in range(len(calls))]

    monkeypatch.setattr(layer_timing, "time_in_turn", time_in_turn)
    memory = Subspace(refresh_every=2)
    configs = [MemAOPConfig(ratio=ratio, memory=memory) for ratio in (1 / 2, 1 / 4)]
    use = Use(9, 8, 8, torch.float32, CPU)
    found = layer_timing.measure_each(use, configs, 1.0, 1e-4)
    # Dense, both without a refresh, the first one with a refresh; and 1 for the forward pass.
    assert [one.dense for one in found] == [[0.0] * 2] * 2
    assert [one.ours for one in found] == [[1 + 1 + (3 - 1) / 2] * 2, [1 + 2 + (3 - 1) / 2] * 2]


def test_how_often_a_timed_layer_refreshes_changes_nothing_else():
    config = MemAOPConfig(budget=1 / 2, memory=Subspace(refresh_every=3), grad_input="projected")
    sizes = set()
    for steps, refreshes in ((layer_timing._NEVER, 0), (3, 2), (1, 5)):
        torch.manual_seed(0)
        layer = MemAOPLinear(64, 96, config=config)
        layer_timing._set_interval(layer, steps)
        bases = []
        for _ in range(6):
            x = torch.randn(512, 2) @ torch.randn(2, 64)
            layer(x.requires_grad_()).backward(torch.randn(512, 96))
            bases.append((layer.memory.basis.clone(), layer.memory.projection.basis.clone()))
        for found in zip(*bases, strict=True):
            same = [torch.equal(one, other) for one, other in itertools.pairwise(found)]
            assert same.count(False) == refreshes
        sizes.add((layer.memory.cost, bases[-1][1].shape))
    assert layer.memory.cost.rank > 0
    assert len(sizes) == 1


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_timed_is_what_is_wanted(monkeypatch, needs, dtype):
    results = []

    def time_in_turn(calls, device, budget, shortest):
        # Rows have the dtype that they were seen in: nothing casts them a second time.
        assert not torch.is_autocast_enabled("cpu")
        results.append([call() for call in calls])
        return [[1.0, 1.0]] * len(calls)

    monkeypatch.setattr(layer_timing, "time_in_turn", time_in_turn)
    config = MemAOPConfig(k=9, memory="none", grad_input="sampled")
    with torch.autocast("cpu", torch.bfloat16):
        layer_timing.measure(Use(9, 8, 4, dtype, CPU, *needs), config, 1.0)
    shapes = [s for s, needed in zip([(4, 8), (4,), (9, 8)], needs, strict=True) if needed]
    for gradients in results[0]:
        assert [tuple(gradient.shape) for gradient in gradients] == shapes
        assert {gradient.dtype for gradient in gradients} == {dtype}
    # With K = M both are exact: the two sides are timed on the same operands.
    for dense, ours in zip(*results[0], strict=True):
        torch.testing.assert_close(ours, dense)
