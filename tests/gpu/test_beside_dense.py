"""Training beside dense: the loss it reaches, the memory it takes, and what it waits for."""

import pytest
import torch
from torch import nn

from memaop_triton import MemAOPConfig, attach_optimizer, convert_, monitor, new_memory
from memaop_triton.backward.weight_grad import weight_grad
from memaop_triton.bench.measure import clock_for
from tests.gpu.helpers import batches, no_synchronisation
from tests.schemes import LEGAL, label

SETTINGS = [
    {},
    {"grad_input": "projected"},
    {"memory": "none"},
    {"selection": "topk", "memory": "residual"},
    {"selection": "topk", "memory": "signed"},
]


def settings(setting):
    return "-".join(map(str, setting.values())) or "default"


def final_loss(config, device, dtype, rows, count, rate):
    """The loss of a net that learns what another net computes, at first and after `count` steps."""
    torch.manual_seed(7)
    teacher, net = (
        nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16)).to(device, dtype)
        for _ in range(2)
    )
    if config is not None:
        convert_(net, config)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    generator = torch.Generator(device).manual_seed(8)
    losses = []
    for _ in range(count):
        x = torch.randn(rows, 32, device=device, generator=generator).to(dtype)
        with torch.no_grad():
            wanted = 4 * teacher(x)
        loss = (net(x) - wanted).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    tail = losses[-max(1, count // 10) :]
    return float(losses[0]), float(torch.stack(tail).mean())


@pytest.mark.parametrize("setting", SETTINGS, ids=settings)
def test_a_small_net_converges_beside_dense(setting, device, half, on_gpu):
    """After the same number of steps at 1/4 it has come at least 85 % as far down as dense."""
    *training, part = on_gpu((512, 400, 2e-3, 0.85), (32, 8, 2e-2, 0.2))
    config = MemAOPConfig(ratio=1 / 4, **setting)
    first, dense = final_loss(None, device, half, *training)
    _, ours = final_loss(config, device, half, *training)
    assert dense < first
    assert first - ours > part * (first - dense)


@pytest.mark.parametrize("scheme", LEGAL, ids=label)
def test_a_step_holds_no_copy_of_its_operands(scheme, device, half, on_gpu):
    """Beyond the memory it keeps, a step never takes as much as a quarter of X and G.

    Where these are small, three quarters: dW alone has a quarter.
    """
    (m, n, p), part = on_gpu(((65536, 512, 512), 1 / 4), ((128, 64, 64), 3 / 4))
    config = MemAOPConfig(ratio=1 / 64, **scheme)
    memory = new_memory(config, n, p)
    ((x, g),) = batches((m, n, p), 1, half, device)
    for _ in range(2):  # what is made once
        weight_grad(x, g, config, memory)
    peak = clock_for(device).peak_bytes(lambda: weight_grad(x, g, config, memory))
    assert peak < part * (x.nbytes + g.nbytes)


@pytest.mark.parametrize("scheme", LEGAL, ids=label)
@pytest.mark.parametrize("grad_input", ["exact", "sampled", "projected"])
def test_a_training_step_does_not_wait_for_the_gpu(scheme, grad_input, device, half, on_gpu):
    """Forward, backward and optimizer, with a rate that changes, and a monitor in the last step."""
    setting = {"ratio": 1 / 4, "grad_input": grad_input, **scheme}
    try:
        config = MemAOPConfig(**setting)
    except ValueError:
        pytest.skip("an input gradient that this scheme does not have")
    net = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)).to(device, half)
    convert_(net, config)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    attach_optimizer(net, optimizer)
    x = torch.randn(on_gpu(1024, 32), 16, device=device).to(half).requires_grad_()

    def step():
        optimizer.zero_grad()
        net(x).float().square().mean().backward()
        optimizer.step()

    step()
    with no_synchronisation(device):
        for rate in on_gpu([1e-3] * 20 + [1e-4], [1e-4]):
            optimizer.param_groups[0]["lr"] = rate
            step()
    with monitor(net, every=1) as watch:
        step()  # makes what the observer keeps
        with no_synchronisation(device):
            step()
    assert watch.read()["0"].observations == 2
