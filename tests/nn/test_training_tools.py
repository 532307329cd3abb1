"""Tools that training scripts use keep working: optimizers, hooks, torch.func, schedules."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memaop_triton import MemAOPConfig, attach_optimizer, convert_

EXACT = MemAOPConfig(ratio=1, memory="none")
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, 0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "muon": lambda p: torch.optim.Muon(p, 1e-2),
}
DRAWS = torch.Generator().manual_seed(1)
X, Y = torch.randn(48, 20, generator=DRAWS), torch.randn(48, 8, generator=DRAWS)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32, bias=False), nn.Tanh(), nn.Linear(32, 8, bias=False))


def loss_of(model):
    return (model(X) - Y).square().mean()


def same_parameters(one, other):
    return all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_take_the_gradients_like_any_others(name, train_step):
    dense, exact, sampled = net(), convert_(net(), EXACT), convert_(net(), MemAOPConfig())
    before = loss_of(sampled)
    for model in (dense, exact, sampled):
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        for _ in range(12):
            train_step(model, X, Y, optimizer)
    assert same_parameters(exact, dense)
    assert not same_parameters(sampled, dense)
    assert loss_of(sampled) < before


@pytest.mark.parametrize("config", [MemAOPConfig(), MemAOPConfig.paper(k=6)], ids=["ours", "paper"])
def test_optimizer_that_steps_in_the_backward_pass(config, train_step):
    usual, within = convert_(net(), config), convert_(net(), config)
    optimizer = torch.optim.SGD(usual.parameters(), 0.1, momentum=0.9)
    own = {p: torch.optim.SGD([p], 0.1, momentum=0.9) for p in within.parameters()}
    attach_optimizer(usual, optimizer)
    attach_optimizer(within, own.values())
    for parameter in own:
        parameter.register_post_accumulate_grad_hook(lambda p: own[p].step())
    for model, steps in ((usual, optimizer), (within, None)):
        torch.manual_seed(1)
        for _ in range(12):
            train_step(model, X, Y, steps)
    assert same_parameters(usual, within)


def test_rates_in_a_tensor_equal_rates_in_a_number(train_step):
    results = []
    for rate in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        model = convert_(net(), MemAOPConfig.paper(k=6))
        optimizer = torch.optim.SGD(model.parameters(), rate, foreach=False)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=20)
        attach_optimizer(model, optimizer)
        for _ in range(12):
            train_step(model, X, Y, optimizer)
            scheduler.step()
        results.append((model[0].weight, model[0].memory.x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stash", ["exact", "int4"])
def test_gradient_transforms(stash):
    """A stash could not be differentiated, so there is none."""
    model, dense = convert_(net(), dataclasses.replace(EXACT, stash=stash)), net()

    def loss(parameters):
        return (torch.func.functional_call(model, parameters, (X,)) - Y).square().mean()

    gradients = torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})
    loss_of(dense).backward()
    for name, p in dense.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad)


def test_second_derivatives_are_refused():
    layer = convert_(nn.Linear(20, 8), MemAOPConfig())
    x = torch.randn(48, 20, requires_grad=True)

    def loss(a):
        return layer(a).square().sum()

    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.functional.hessian(loss, x)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.func.grad(lambda a: torch.func.grad(loss)(a).sum())(x.detach())
    layer.eval()
    assert torch.autograd.functional.hessian(loss, x).any()


def test_gradients_with_a_graph_of_a_checkpointed_layer():
    """A saved tensor of a checkpoint can be unpacked once, and that is enough."""
    layer = convert_(nn.Linear(20, 8), EXACT)
    x = torch.randn(48, 20, requires_grad=True)
    loss = checkpoint(layer, x, use_reentrant=False).square().sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    expected = torch.autograd.grad(layer.eval()(x).square().sum(), x)[0]
    torch.testing.assert_close(dx.detach(), expected)
