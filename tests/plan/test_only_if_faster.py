"""`convert_(..., only_if_faster=True)` leaves dense what it would make slower."""

import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn

from memaop_triton import MemAOPConfig, MemAOPLinear, convert_

X = torch.ones(20, 8)
CONFIG = MemAOPConfig()


@pytest.fixture(autouse=True)
def _the_last_layer_gets_slower(measured):
    measured.times[20, 16, 3] = [2.0] * 3, [3.0] * 3


def net():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 3))


def converted(model):
    return [name for name, module in model.named_modules() if isinstance(module, MemAOPLinear)]


def test_the_losers_stay_dense_and_are_named(measured, caplog, recwarn):
    for names in (["0", "2"], ["0", "2", "3"]):
        caplog.clear()
        model = net()
        with caplog.at_level(logging.INFO, "memaop_triton.convert"):
            assert convert_(model, CONFIG, only_if_faster=True, example_inputs=X) is model
        assert converted(model) == names
        losers = ["left dense, because conversion makes them no faster: 3"]
        assert caplog.messages == (losers if measured.times else [])
        measured.times.clear()
    assert not recwarn.list


def test_each_layer_keeps_its_configuration():
    model, other = net(), MemAOPConfig(k=3)
    overrides = {"0": None, "2": other}
    convert_(model, CONFIG, overrides=overrides, only_if_faster=True, example_inputs=X)
    assert converted(model) == ["2"]
    assert model[2].config == other


def test_where_none_gets_faster_a_warning_says_so():
    model = net()[3:]
    with pytest.warns(UserWarning, match="nothing is converted: none of 1 layer") as caught:
        convert_(model, CONFIG, only_if_faster=True, example_inputs=torch.ones(20, 16))
    assert caught[0].filename == __file__
    assert not converted(model)


def test_loss_fn_is_used():
    model = nn.ModuleDict({"a": nn.Linear(8, 16), "b": nn.Linear(8, 16)})
    model.forward = lambda x: (model["a"](x), model["b"](x))
    convert_(model, CONFIG, only_if_faster=True, example_inputs=X, loss_fn=lambda y: y[1].sum())
    assert converted(model) == ["b"]


def test_the_first_process_decides_for_all(monkeypatch):
    """A process that would have converted "0" and "2" hears that the first one takes "2" only."""

    def broadcast(objects, src):
        assert (objects, src) == ([("0", "2")], 0)
        objects[0] = ("2",)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    assert converted(convert_(net(), CONFIG, only_if_faster=True, example_inputs=X)) == ["2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"only_if_faster": True}, "only_if_faster=True needs example_inputs"),
        ({"example_inputs": X}, "no meaning without only_if_faster=True"),
        ({"loss_fn": torch.sum}, "no meaning without only_if_faster=True"),
        # An error of the model itself.
        (
            {"config": CONFIG, "only_if_faster": True, "example_inputs": X[:, 1:]},
            "cannot be multiplied",
        ),
        # What it would measure is not said.
        ({"only_if_faster": True, "example_inputs": X}, r"pass config=MemAOPConfig"),
    ],
)
def test_what_goes_wrong_converts_nothing(arguments, message):
    model = net()
    with pytest.raises((ValueError, RuntimeError), match=message):
        convert_(model, **arguments)
    assert not converted(model)
