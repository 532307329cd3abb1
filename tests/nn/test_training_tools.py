"""What a training script already uses goes on working: optimizers, hooks, torch.func, schedules."""

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
SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=20),
    "warm-up": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1, (step + 1) / 4)),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32, bias=False), nn.Tanh(), nn.Linear(32, 8, bias=False))


def train(model, update, steps=12, scheduler=None):
    torch.manual_seed(1)
    x, y = torch.randn(48, 20), torch.randn(48, 8)
    losses = []
    for _ in range(steps):
        loss = (model(x) - y).square().mean()
        loss.backward()
        update()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def stepping(optimizer):
    def update():
        optimizer.step()
        optimizer.zero_grad()

    return update


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_take_the_gradients_like_any_others(name):
    dense, exact, sampled = net(), convert_(net(), EXACT), convert_(net(), MemAOPConfig())
    losses = [
        train(model, stepping(OPTIMIZERS[name](list(model.parameters()))))
        for model in (dense, exact, sampled)
    ]
    assert losses[1] == losses[0]
    assert losses[2] != losses[0]
    assert losses[2][-1] < losses[2][0]


@pytest.mark.parametrize("config", [MemAOPConfig(), MemAOPConfig.paper(k=6)], ids=["ours", "paper"])
def test_optimizer_that_steps_in_the_backward_pass(config):
    usual, within = convert_(net(), config), convert_(net(), config)
    optimizer = torch.optim.SGD(usual.parameters(), 0.1, momentum=0.9)
    own = {p: torch.optim.SGD([p], 0.1, momentum=0.9) for p in within.parameters()}
    attach_optimizer(usual, optimizer)
    attach_optimizer(within, own.values())

    def update(parameter):
        own[parameter].step()
        own[parameter].zero_grad()

    for parameter in own:
        parameter.register_post_accumulate_grad_hook(update)
    assert train(usual, stepping(optimizer)) == train(within, lambda: None)
    assert all(map(torch.equal, usual.parameters(), within.parameters()))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_in_a_tensor_equal_rates_in_a_number(name):
    runs = []
    for as_tensor in (False, True):
        model = convert_(net(), MemAOPConfig.paper(k=6))
        rate = torch.tensor(0.1, dtype=torch.float64) if as_tensor else 0.1
        optimizer = torch.optim.SGD(model.parameters(), rate, foreach=False)
        scheduler = SCHEDULERS[name](optimizer)
        attach_optimizer(model, optimizer)
        memory = model[0].memory
        runs.append((train(model, stepping(optimizer), scheduler=scheduler), memory.x.clone()))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-5)
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=1e-4, atol=1e-5)


def test_gradient_transforms():
    model = convert_(net(), EXACT)
    x = torch.randn(48, 20)

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = torch.func.grad(loss)(parameters)
    dense = dict(net().named_parameters())
    torch.func.functional_call(net(), dense, (x,)).square().mean().backward()
    for name, p in dense.items():
        torch.testing.assert_close(gradients[name], p.grad)


def test_second_derivatives_are_refused():
    layer = convert_(nn.Linear(20, 8))
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
