"""Ratios that follow a schedule."""

import copy
import math

import pytest
import torch
from torch import nn

from memaop_triton import MemAOPConfig, RatioScheduler, convert_, monitor
from memaop_triton.monitor.schedules import VarianceControl, dense_warmup, growing
from tests.schemes import flat_config

N = 8


def net(**settings):
    settings = {"ratio": 1 / 8, "memory": "none"} | settings
    return convert_(
        nn.Sequential(nn.Linear(N, N), nn.Tanh(), nn.Linear(N, N)), flat_config(**settings)
    )


def train(model, steps, after_step=lambda: None):
    for _ in range(steps):
        model(torch.randn(64, N)).square().sum().backward()
        after_step()


def ratios(model):
    return [layer.config.ratio for layer in model if isinstance(layer, nn.Linear)]


def test_sets_the_ratio_at_once_and_at_every_step():
    model = net()
    called = []
    scheduler = RatioScheduler(model, lambda step: called.append(step) or 1 / (step + 2))
    assert ratios(model) == [1 / 2, 1 / 2]
    scheduler.step()
    assert ratios(model) == [1 / 3, 1 / 3]
    assert scheduler.get_last_ratios() == {"0": 1 / 3, "2": 1 / 3}
    every_third = RatioScheduler(model, lambda step: called.append(-step) or 1.0, every=3)
    for _ in range(7):
        every_third.step()
    assert called == [0, 1, 0, -3, -6]


def test_layers_that_a_schedule_does_not_name_keep_their_ratio():
    model = net()
    RatioScheduler(model, lambda step: {"2": 1 / 4})
    assert ratios(model) == [1 / 8, 1 / 4]
    with pytest.raises(ValueError, match=r"not converted: \['1'\]"):
        RatioScheduler(model, lambda step: {"1": 1 / 4})
    with pytest.raises(ValueError, match="ratio=0"):
        RatioScheduler(model, lambda step: 0.0)


def test_schedules_of_steps():
    warm = dense_warmup(3, 1 / 8)
    assert [warm(step) for step in range(5)] == [1, 1, 1, 1 / 8, 1 / 8]
    grown = growing(1 / 16, 1 / 2, 9)
    assert [grown(s) for s in range(11)] == [1 / 16] * 3 + [1 / 8] * 3 + [1 / 4] * 3 + [1 / 2] * 2
    assert [growing(0.1, 0.3, 4)(s) for s in range(6)] == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    assert [growing(0.25, 0.25, 4)(s) for s in (0, 9)] == [0.25, 0.25]
    both = dense_warmup(2, growing(1 / 4, 1 / 2, 2))
    assert [both(step) for step in range(6)] == [1, 1, 1 / 4, 1 / 4, 1 / 2, 1 / 2]
    for wrong in ((0, 1, 1), (0.5, 0.25, 1), (0.5, 2, 1), (0.1, 0.5, 0)):
        with pytest.raises(ValueError, match="must be"):
            growing(*wrong)
    with pytest.raises(ValueError, match="steps=-1"):
        dense_warmup(-1, 0.5)


@pytest.mark.parametrize("memory", ["none", "residual", "subspace"])
def test_a_dense_warm_up_is_exact_and_scores_nothing(memory, monkeypatch):
    selection = "topk" if memory == "residual" else "priority"
    model = net(memory=memory, selection=selection, rank=2)
    dense = copy.deepcopy(model).eval()
    scheduler = RatioScheduler(model, dense_warmup(2, 1 / 8))
    selected = []
    for name in ("without_memory", "with_row_memory", "with_subspace"):
        monkeypatch.setattr(
            f"memaop_triton.backward.steps_torch.{name}", _recording(name, selected)
        )
    for _ in range(2):
        x = torch.randn(64, N)
        for one in (model, dense):
            one.zero_grad()
            one(x).square().sum().backward()
        for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)
        assert selected == []
        if model[0].memory is not None:
            assert model[0].memory.nbytes == 0
        scheduler.step()
    train(model, 1)
    assert len(selected) == 2


def _recording(name, calls):
    from memaop_triton.backward import steps_torch as steps

    step = getattr(steps, name)
    return lambda *args: calls.append(name) or step(*args)


def test_variance_control_holds_the_variance_near_its_target():
    torch.manual_seed(0)
    model = net(ratio=1 / 32)
    target = 1.0
    control = VarianceControl(target, factor=0.8)
    with monitor(model, every=1, smoothing=0.8, starving=1e9) as watch:
        scheduler = RatioScheduler(model, control, watch, every=5)
        assert ratios(model) == [1 / 32, 1 / 32]  # nothing was observed
        train(model, 150, scheduler.step)
        seen, reached = watch.read(), scheduler.get_last_ratios()
    # Rows of equal size: M/K − 1, which is 1 at 1/2.
    for name in seen:
        assert reached[name] in (1 / 4, 1 / 2, 1.0)
        assert seen[name].relative_variance < 3 * target
    # And back again when there is no need of it.
    control.target = 1e6
    with monitor(model, every=1, smoothing=0.8, starving=1e9) as watch:
        scheduler.monitor = watch
        train(model, 100, scheduler.step)
    assert ratios(model) == [1 / 32, 1 / 32]


def test_variance_control_goes_by_its_factor_and_the_list():
    model = net(ratio=1 / 4)
    with monitor(model, every=1, starving=1e9) as watch:
        train(model, 3)
        seen = watch.read()
        assert 0.5 < seen["0"].relative_variance < 30
        up, down = VarianceControl(0.01, factor=0.9), VarianceControl(100, factor=0.9)
        assert up(1, seen) == {"0": 1 / 2, "2": 1 / 2}
        assert down(1, seen) == {"0": 1 / 4, "2": 1 / 4}
        assert down.state_dict()["0"] == pytest.approx(0.9 / 4)
        for _ in range(6):
            down(1, seen)
        assert down(1, seen)["0"] == 1 / 8
        for _ in range(99):
            down(1, seen)
            up(1, seen)
        assert down(1, seen)["0"] == 1 / 32
        assert up(1, seen)["0"] == 1


def test_biased_layers_are_left_alone():
    model = net(selection="topk")
    with monitor(model, every=1) as watch:
        train(model, 3)
        assert VarianceControl(1.0)(1, watch.read()) == {}


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="no converted layer"):
        RatioScheduler(nn.Linear(2, 2), lambda step: 1.0)
    with pytest.raises(ValueError, match="every=0"):
        RatioScheduler(net(), lambda step: 1.0, every=0)
    for wrong in ({"target": 0}, {"target": 1, "factor": 1}, {"target": 1, "ratios": (2,)}):
        with pytest.raises(ValueError, match=f"{list(wrong)[-1]}="):
            VarianceControl(**wrong)


def test_a_resumed_scheduler_goes_on_where_it_was():
    model = net(ratio=1 / 32)
    with monitor(model, every=1, starving=1e9) as watch:
        scheduler = RatioScheduler(model, VarianceControl(0.5), watch, every=2)
        train(model, 9, scheduler.step)
        state = copy.deepcopy(scheduler.state_dict())
        seen = watch.read()
    assert state["last_step"] == 9
    twin = net(ratio=1 / 32)
    with monitor(twin) as other:
        resumed = RatioScheduler(twin, VarianceControl(0.5), other, every=2)
        resumed.load_state_dict(state)
    assert ratios(twin) == ratios(model) != [1 / 32, 1 / 32]
    assert resumed.schedule(10, seen) == scheduler.schedule(10, seen)
    assert resumed.state_dict()["schedule"] == scheduler.state_dict()["schedule"]
    resumed.step()
    assert resumed.last_step == 10


def test_the_state_of_a_model_with_other_layers_is_refused():
    scheduler = RatioScheduler(net(), dense_warmup(1, 0.5))
    state = scheduler.state_dict()
    assert state == {"last_step": 0, "ratios": {"0": 1.0, "2": 1.0}}
    state["ratios"]["4"] = state["ratios"].pop("2")
    with pytest.raises(ValueError, match=r"\['2', '4'\]"):
        scheduler.load_state_dict(state)


def test_layers_with_a_number_of_rows_have_no_ratio_until_they_get_one():
    model = convert_(nn.Sequential(nn.Linear(N, N)), MemAOPConfig(k=4))
    scheduler = RatioScheduler(model, lambda step: {} if step < 1 else 0.5)
    assert math.isnan(scheduler.get_last_ratios()["0"])
    state = scheduler.state_dict()
    scheduler.step()
    assert scheduler.get_last_ratios() == {"0": 0.5}
    scheduler.load_state_dict(state)
    assert scheduler.last_step == 0
