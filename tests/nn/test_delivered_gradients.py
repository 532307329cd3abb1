"""A backward pass computes the required gradients, and updates a memory only with its dW."""

import copy

import pytest
import torch
from torch import nn

from memaop_triton import MemAOPConfig, MemAOPLinear, Projected, Sampled, convert_
from memaop_triton.nn import ops
from tests.schemes import flat_config

SCHEMES = {
    "subspace": {},
    "subspace, sampled dX": {"grad_input": Sampled(), "side": "grad"},
    "subspace, projected dX": {"grad_input": Projected()},
    "sampled dX": {"memory": "none", "grad_input": Sampled()},
    "residual": {"selection": "topk", "memory": "residual"},
    "signed": {"selection": "randk", "memory": "signed"},
}


@pytest.fixture(params=SCHEMES.values(), ids=SCHEMES.keys())
def layer(request):
    return MemAOPLinear(16, 12, config=flat_config(ratio=1 / 4, rank=2, **request.param))


@pytest.fixture
def computed(monkeypatch):
    """Shapes of the dW that were computed."""
    shapes = []

    def recording(*args, **kwargs):
        gradients = compute(*args, **kwargs)
        shapes.append(tuple(gradients.weight.shape))
        return gradients

    compute = ops.weight_and_bias_grad
    monkeypatch.setattr(ops, "weight_and_bias_grad", recording)
    return shapes


@pytest.fixture
def held(contents):
    """A copy of a layer's memory, but for what belongs to dX."""
    return lambda layer: {
        name: value
        for name, value in contents(layer.memory).items()
        if not name.startswith("projection")
    }


def loss_of(layer, leaf=True):
    x = torch.randn(32, 16, requires_grad=True)
    inputs = x if leaf else x * 2
    return x, layer(inputs).square().sum()


WITHOUT_WEIGHT = {
    "grad of x": lambda x, loss, layer: torch.autograd.grad(loss, x),
    "backward to x": lambda x, loss, layer: loss.backward(inputs=[x]),
    "grad of the bias": lambda x, loss, layer: torch.autograd.grad(loss, layer.bias),
}
WITH_WEIGHT = {
    "backward": lambda x, loss, layer: loss.backward(),
    "grad of the weight": lambda x, loss, layer: torch.autograd.grad(loss, layer.weight),
    "backward to the weight": lambda x, loss, layer: loss.backward(inputs=[layer.weight]),
}


@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "inner"])
@pytest.mark.parametrize("ask", WITHOUT_WEIGHT.values(), ids=WITHOUT_WEIGHT.keys())
def test_without_the_weight_no_dw_is_computed_and_the_memory_stays(
    ask, leaf, layer, computed, held, same
):
    loss_of(layer)[1].backward()  # so that there is a memory
    before = held(layer)
    computed.clear()
    x, loss = loss_of(layer, leaf)
    ask(x, loss, layer)
    assert computed == []
    assert same(held(layer), before)


@pytest.mark.parametrize("ask", WITH_WEIGHT.values(), ids=WITH_WEIGHT.keys())
def test_with_the_weight_dw_is_computed_once(ask, layer, computed):
    x, loss = loss_of(layer)
    ask(x, loss, layer)
    assert computed == [(12, 16)]


def test_a_backward_pass_split_into_inputs_and_weights_is_one_step(layer, computed, held, same):
    """As pipeline schedules without bubbles have it: the same nodes run twice."""
    split, whole = copy.deepcopy(layer), copy.deepcopy(layer)
    for step in range(3):
        gradients = []
        for one in (split, whole):
            torch.manual_seed(step)
            x, loss = loss_of(one, leaf=False)
            parameters = [one.weight, one.bias]
            if one is split:
                torch.autograd.grad(loss, x, retain_graph=True)
                torch.manual_seed(step + 100)
                gradients.append(torch.autograd.grad(loss, parameters))
            else:
                torch.manual_seed(step + 100)
                gradients.append(torch.autograd.grad(loss, [x, *parameters])[1:])
        if layer.config.grad_input is None:  # else the two passes draw in another order
            torch.testing.assert_close(*gradients, rtol=0, atol=0)
            assert same(held(split), held(whole))
    assert len(computed) == 6
    if layer.config.subspace is not None:
        assert split.memory.step == whole.memory.step == 3


def test_of_layers_in_a_row_only_those_below_the_cut_are_skipped(computed):
    net = convert_(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), MemAOPConfig(ratio=1 / 4))
    loss = net(torch.randn(16, 8)).sum()
    torch.autograd.grad(loss, net[1].weight, retain_graph=True)
    assert computed == [(4, 6)]
    assert (net[0].memory.step, net[1].memory.step) == (0, 1)
    torch.autograd.grad(loss, net[0].weight)
    assert computed == [(4, 6), (6, 8)]
