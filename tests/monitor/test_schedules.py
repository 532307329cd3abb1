"""Ratios that follow a schedule."""

import copy
import math

import pytest
import torch
from torch import nn

from memaop_triton import MemAOPConfig, RatioScheduler, convert_
from tests.schemes import flat_config

N = 8


def net(**settings):
    settings = {"ratio": 1 / 8, "memory": "none"} | settings
    return convert_(
        nn.Sequential(nn.Linear(N, N), nn.Tanh(), nn.Linear(N, N)), flat_config(**settings)
    )


def ratios(model):
    return [layer.config.ratio for layer in model if isinstance(layer, nn.Linear)]


def test_sets_the_ratio_at_once_and_at_every_step_of_the_layers_that_it_names():
    model = net()
    called = []
    scheduler = RatioScheduler(model, lambda step: called.append(step) or 1 / (step + 2))
    assert ratios(model) == [1 / 2, 1 / 2]
    scheduler.step()
    assert ratios(model) == [1 / 3, 1 / 3]
    assert scheduler.get_last_ratios() == {"0": 1 / 3, "2": 1 / 3}
    assert called == [0, 1]
    RatioScheduler(model, lambda step: {"2": 1 / 4})
    assert ratios(model) == [1 / 3, 1 / 4]


def test_what_is_wrong_is_named():
    for model, schedule, message in (
        (nn.Linear(2, 2), lambda step: 1.0, "no converted layer"),
        (net(), lambda step: {"1": 1 / 4}, r"not converted: \['1'\]"),
        (net(), lambda step: 0.0, "ratio=0"),
    ):
        with pytest.raises(ValueError, match=message):
            RatioScheduler(model, schedule)
    scheduler = RatioScheduler(net(), lambda step: 1.0)
    state = scheduler.state_dict()
    assert state == {"last_step": 0, "ratios": {"0": 1.0, "2": 1.0}}
    state["ratios"]["4"] = state["ratios"].pop("2")
    with pytest.raises(ValueError, match=r"\['2', '4'\]"):
        scheduler.load_state_dict(state)


@pytest.mark.parametrize("memory", ["none", "residual", "subspace"])
def test_a_dense_warm_up_is_exact_and_scores_nothing(memory, selections):
    selection = "topk" if memory == "residual" else "priority"
    model = net(memory=memory, selection=selection, rank=2)
    dense = copy.deepcopy(model).eval()
    scheduler = RatioScheduler(model, lambda step: 1.0 if step < 2 else 1 / 8)
    for _ in range(2):
        x = torch.randn(64, N)
        for one in (model, dense):
            one.zero_grad()
            one(x).square().sum().backward()
        for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)
        assert selections == []
        if model[0].memory is not None:
            assert model[0].memory.nbytes == 0
        scheduler.step()
    model(torch.randn(64, N)).square().sum().backward()
    assert len(selections) == 2


def test_a_resumed_scheduler_continues_where_it_stopped():
    model, twin = net(), net()
    scheduler, resumed = (
        RatioScheduler(one, lambda step: {"2": 1 / (step + 1)}) for one in (model, twin)
    )
    for _ in range(3):
        scheduler.step()
    resumed.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    assert resumed.last_step == 3
    assert ratios(twin) == ratios(model) == [1 / 8, 1 / 4]
    resumed.step()
    assert ratios(twin) == [1 / 8, 1 / 5]


def test_layers_with_a_number_of_rows_have_no_ratio_until_they_get_one():
    model = convert_(nn.Sequential(nn.Linear(N, N)), MemAOPConfig(k=4))
    scheduler = RatioScheduler(model, lambda step: {} if step < 1 else 0.5)
    assert math.isnan(scheduler.get_last_ratios()["0"])
    state = scheduler.state_dict()
    scheduler.step()
    assert scheduler.get_last_ratios() == {"0": 0.5}
    scheduler.load_state_dict(state)
    assert scheduler.last_step == 0
