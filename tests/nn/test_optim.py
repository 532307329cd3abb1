import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from memaop_triton import MemAOPConfig, attach_optimizer, convert_

PAPER = MemAOPConfig.paper(k=2)


def two_layers():
    return convert_(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), PAPER)


def attached(model, lr=0.4):
    """An optimizer of all parameters, which the memories of `model` follow."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    attach_optimizer(model, optimizer)
    return optimizer


def test_every_layer_follows_the_group_of_its_weight():
    model = two_layers()
    groups = [
        {"params": [model[0].bias, model[1].bias], "lr": 0.5},
        {"params": [model[1].weight], "lr": 0.25},
        {"params": [model[0].weight], "lr": 0.125},
    ]
    optimizer = torch.optim.SGD(groups)
    assert model[0].memory.learning_rate is None
    attach_optimizer(model, optimizer)
    assert model[0].memory.learning_rate == 0.125
    assert model[1].memory.learning_rate == 0.25
    optimizer.param_groups[1]["lr"] = 0.75
    assert model[1].memory.learning_rate == 0.75
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[1]["lr"] = torch.tensor(0.5)
    assert model[1].memory.learning_rate == 0.5


def test_memory_rests_while_the_rate_is_zero(contents, same):
    layer = convert_(nn.Linear(6, 5), PAPER)
    optimizer = attached(layer)
    layer(torch.randn(9, 6)).sum().backward()
    before = contents(layer.memory)
    optimizer.param_groups[0]["lr"] = 0.0
    layer(torch.randn(9, 6)).sum().backward()
    assert same(contents(layer.memory), before)
    assert layer.weight.grad.isfinite().all()


def test_copies_and_lost_optimizers_are_not_attached():
    model = two_layers()
    optimizer = attached(model)
    assert copy.deepcopy(model)[0].memory.learning_rate is None
    del optimizer
    gc.collect()
    assert model[0].memory.learning_rate is None
    model(torch.randn(9, 6)).sum().backward()


def test_every_row_memory_needs_the_optimizer_of_its_weight():
    model = two_layers()
    optimizer = torch.optim.SGD([*model[0].parameters(), model[1].bias], lr=1)
    with pytest.raises(ValueError, match="optimizer does not hold the weight of layer '1'"):
        attach_optimizer(model, optimizer)
    model[1].weight.requires_grad_(False)
    attach_optimizer(model, optimizer)
    attach_optimizer(convert_(nn.Sequential(nn.Linear(6, 5))), optimizer)
    with pytest.raises(ValueError, match="no converted layer: call convert_"):
        attach_optimizer(nn.Linear(6, 5), optimizer)


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, lambda one: prune.l1_unstructured(one, "weight", 3)]
)
def test_a_computed_weight_follows_the_parameters_it_is_made_of(wrap):
    layer = convert_(wrap(nn.Linear(6, 5)), PAPER, filter_fn=lambda module, name: True)
    optimizer = attached(layer)
    assert layer.memory.learning_rate == optimizer.param_groups[0]["lr"] == 0.4
