"""`convert_(..., only_if_faster=True)` leaves dense what it would make slower."""

import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn

from memaop_triton import MemAOPConfig, MemAOPLinear, convert_
from memaop_triton.plan import planning
from memaop_triton.plan.layer_timing import Measurement

X = torch.ones(20, 8)


@pytest.fixture
def faster(monkeypatch):
    """Replaces measuring: layers with this many outputs get faster, the others slower."""
    outputs = {16}

    def measure(use, config, budget):
        ours = 1.0 if use.out_features in outputs else 3.0
        return Measurement([2.0] * 3, [ours] * 3, 0)

    monkeypatch.setattr(planning, "measure", measure)
    return outputs


def net():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 3))


def converted(model):
    return [name for name, module in model.named_modules() if isinstance(module, MemAOPLinear)]


@pytest.mark.parametrize(
    ("outputs", "names", "messages"),
    [
        ({16}, ["0", "2"], ["left dense, because conversion makes them no faster: 3"]),
        ({16, 3}, ["0", "2", "3"], []),
    ],
)
def test_the_losers_stay_dense_and_are_named(faster, caplog, recwarn, outputs, names, messages):
    faster |= outputs
    model = net()
    with caplog.at_level(logging.INFO, "memaop_triton.convert"):
        assert convert_(model, only_if_faster=True, example_inputs=X) is model
    assert converted(model) == names
    assert caplog.messages == messages
    assert not recwarn.list


def test_each_layer_keeps_its_configuration(faster):
    model, other = net(), MemAOPConfig(k=3)
    convert_(
        model,
        MemAOPConfig(k=5),
        lambda module, name: name != "0",
        {"2": other},
        only_if_faster=True,
        example_inputs=X,
    )
    assert converted(model) == ["2"]
    assert model[2].config == other


def test_where_none_gets_faster_a_warning_says_so(faster):
    faster.clear()
    model = net()
    with pytest.warns(UserWarning, match="nothing is converted: none of 3 layers") as caught:
        assert convert_(model, only_if_faster=True, example_inputs=X) is model
    assert caught[0].filename == __file__
    assert not converted(model)


def test_loss_fn_is_used(faster):
    model = nn.ModuleDict({"a": nn.Linear(8, 16), "b": nn.Linear(8, 16)})
    model.forward = lambda x: (model["a"](x), model["b"](x))
    convert_(model, only_if_faster=True, example_inputs=X, loss_fn=lambda y: y[1].sum())
    assert converted(model) == ["b"]


def test_the_first_process_decides_for_all(faster, monkeypatch):
    """A process that would have converted "0" and "2" hears that the first one takes "2" only."""

    def broadcast(objects, src):
        assert (objects, src) == ([("0", "2")], 0)
        objects[0] = ("2",)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    assert converted(convert_(net(), only_if_faster=True, example_inputs=X)) == ["2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"only_if_faster": True}, "only_if_faster=True needs example_inputs"),
        ({"example_inputs": X}, "no meaning without only_if_faster=True"),
        ({"loss_fn": torch.sum}, "no meaning without only_if_faster=True"),
    ],
)
def test_what_belongs_together(arguments, message):
    model = net()
    with pytest.raises(ValueError, match=message):
        convert_(model, **arguments)
    assert not converted(model)


def test_an_error_of_the_model_converts_nothing(faster):
    model = net()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        convert_(model, only_if_faster=True, example_inputs=torch.ones(20, 9))
    assert not converted(model)
