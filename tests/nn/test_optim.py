import copy
import gc
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from memaop_triton import MemAOPConfig, Rows, attach_optimizer, convert_

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


def test_carried_rows_are_rescaled_by_the_root_of_the_rates():
    layer = convert_(nn.Linear(6, 5), MemAOPConfig.paper(k=1, memory=Rows(decay=0.5)))
    optimizer = attached(layer)
    layer(torch.randn(9, 6)).square().sum().backward()
    before, filled = layer.memory.x.clone(), layer.memory.filled.clone()
    optimizer.param_groups[0]["lr"] = 0.1
    (layer(torch.zeros(9, 6)) * 0).sum().backward()
    kept = filled & layer.memory.filled
    assert kept.sum() == 7
    torch.testing.assert_close(layer.memory.x[kept], math.sqrt(0.5 * 4) * before[kept])


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


def test_a_model_without_a_row_memory_needs_no_optimizer_and_one_without_a_layer_is_refused():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    attach_optimizer(convert_(nn.Sequential(nn.Linear(6, 5))), optimizer)
    with pytest.raises(ValueError, match="no converted layer: call convert_"):
        attach_optimizer(nn.Linear(6, 5), optimizer)


def test_optimizer_without_the_weight_names_the_layer():
    model = two_layers()
    optimizer = torch.optim.SGD([*model[0].parameters(), model[1].bias], lr=1)
    with pytest.raises(ValueError, match="optimizer does not hold the weight of layer '1'"):
        attach_optimizer(model, optimizer)
    model[1].weight.requires_grad_(False)
    attach_optimizer(model, optimizer)


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, lambda one: prune.l1_unstructured(one, "weight", 3)]
)
def test_a_computed_weight_follows_the_parameters_it_is_made_of(wrap):
    layer = convert_(wrap(nn.Linear(6, 5)), PAPER, filter_fn=lambda module, name: True)
    optimizer = attached(layer)
    assert layer.memory.learning_rate == optimizer.param_groups[0]["lr"] == 0.4


def test_slots_beyond_a_shorter_batch_are_rescaled_too():
    model = convert_(nn.Sequential(nn.Linear(6, 4)), MemAOPConfig.paper(k=2))
    optimizer = attached(model)
    model(torch.randn(9, 6)).square().sum().backward()
    memory = model[0].memory
    x, g, filled = memory.x[5:].clone(), memory.g[5:].clone(), memory.filled[5:].clone()
    optimizer.param_groups[0]["lr"] = 0.1
    model(torch.randn(5, 6)).square().sum().backward()
    torch.testing.assert_close(memory.x[5:][filled], 2 * x[filled])
    torch.testing.assert_close(memory.g[5:][filled], 2 * g[filled])
