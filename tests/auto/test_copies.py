"""Copies of models with `ratio="auto"`: decided about by controllers of their own."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from memaop_triton import MemAOPConfig, auto_freeze, convert_, model_report, revert_

EASY = {"rows": 512, "noise": 0.0}
FAST = {1 / 2: 0.6, 1 / 4: 0.35, 1 / 8: 0.2, 1 / 16: 0.15}


def fast(ratio):
    return FAST.get(ratio, 1.0)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def controller_of(model):
    return model[0].layer_state.controller


def take_over(run, model):
    run.model, run.linears, run.modes = model, (model[0], model[2]), []
    run.optimizer = torch.optim.SGD(model.parameters(), 0.1)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_a_copy_that_is_trained_is_decided_about(duplicate, training):
    """As one that is made for each seed before training, or early in it."""
    for steps in (0, 4, 9):
        run = training(**EASY, true=fast)
        run.step(steps)
        original, twin = run.model, duplicate(run.model)
        assert "ratio=auto, exact now" in repr(twin)
        assert model_report(twin).startswith("exact: a training is left alone")
        take_over(run, twin)
        run.step(60)
        assert run.modes[:13] == [False] * 13
        assert all(run.modes[47:])
        assert controller_of(twin) is twin[2].layer_state.controller
        assert controller_of(twin).phase == "sampling"
        assert controller_of(original).steps == steps, "the original was not trained"
        assert original[0].config.ratio == 1


def test_a_copy_goes_on_from_what_was_decided_and_leaves_the_original_alone(training):
    run = training(**EASY, true=fast)
    run.step(60)
    original, twin = run.model, copy.deepcopy(run.model)
    shares = dict(controller_of(original).shares)
    take_over(run, twin)
    run.step(20)
    assert all(run.modes)
    assert controller_of(twin).shares == shares
    auto_freeze(twin)
    assert controller_of(original).phase == "sampling"
    again = pickled(twin)
    take_over(run, again)
    run.step(120)
    assert controller_of(again).phase == "frozen"
    assert all(run.modes)
    assert not any(controller_of(again).seen.values())


def test_a_copy_of_a_trial_is_exact(training):
    run = training(**EASY, true=fast)
    run.step(20)
    assert run.modes[-1]
    twin = copy.deepcopy(run.model)
    assert twin[0].layer_state.is_native
    assert twin[0].config.ratio == 1


def test_averages_of_a_model_do_not_disturb_it(training):
    run = training(**EASY, true=fast)
    average = AveragedModel(run.model)
    for _ in range(60):
        run.step()
        average.update_parameters(run.model)
        average(torch.randn(2, 16))
    assert run.controller.phase == "sampling"
    assert controller_of(average.module).steps == 0
    assert "ratio=auto, exact now" in repr(average)


def test_a_copy_of_some_layers_is_decided_about_by_itself(training):
    run = training(**EASY, true=fast)
    run.step(3)
    layer = copy.deepcopy(run.model[2])
    decided = layer.layer_state.controller
    assert list(decided.shares) == ["2"]
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    for _ in range(13):
        layer(torch.randn(64, 16)).square().mean().backward()
        run.now += 1.0
        optimizer.step()
    assert len(decided.seen["2"]) == 3
    assert run.controller.steps == 3


def test_a_shallow_copy_has_the_controller_of_the_original(training):
    run = training(**EASY, true=fast)
    shallow = copy.copy(run.model[0])
    assert shallow.layer_state is run.model[0].layer_state
    run.step(60)
    assert run.controller.phase == "sampling"


def test_a_copy_of_subclasses_and_shared_layers_and_a_ratio_of_ones_own():
    class Special(nn.Linear):
        pass

    layer = Special(8, 8)
    model = nn.Sequential(layer, nn.Linear(8, 8), layer, nn.Linear(8, 8))
    convert_(model, MemAOPConfig(ratio="auto"), filter_fn=lambda *_: True)
    model[1].set_ratio_(1 / 4)
    twin = copy.deepcopy(model)
    assert list(controller_of(twin).shares) == ["0", "3"]
    assert twin[0] is twin[2]
    assert twin[1].layer_state.controller is None
    assert twin[1].config.ratio == 1 / 4
    revert_(twin)
    assert type(twin[0]) is Special
