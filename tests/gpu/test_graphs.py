"""CUDA graphs, compilers and mixed precision on a real GPU: `make gpu`, or `pytest -m gpu`."""

import copy

import pytest
import torch
from torch import nn

from memaop_triton import (
    MemAOPConfig,
    attach_optimizer,
    convert_,
    load_memory_state_dict,
    memory_state_dict,
    monitor,
)
from tests.schemes import flat_config

ROWS, WARM_UP = 512, 3


def net(config):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(128, 192), nn.GELU(), nn.Linear(192, 64))
    return convert_(layers.to("cuda", torch.bfloat16), config)


def batches(count):
    generator = torch.Generator("cuda").manual_seed(1)
    return [
        torch.randn(ROWS, 128, generator=generator, device="cuda").bfloat16() for _ in range(count)
    ]


def backward(call, x):
    call(x).float().square().mean().backward()


def tensors(model):
    """What the memories hold."""
    states = memory_state_dict(model).values()
    return [v for s in states for v in s.values() if isinstance(v, torch.Tensor)]


def configuration(memory):
    """By the memory; "projected" is a subspace for dX as well."""
    settings = {"selection": "topk" if memory in ("residual", "signed") else "priority"}
    settings["memory"] = "subspace" if memory == "projected" else memory
    if memory == "projected":
        settings["grad_input"] = "projected"
    return flat_config(ratio=1 / 4, refresh_every=3, **settings)


@pytest.mark.parametrize("memory", ["none", "residual", "subspace"])
def test_graphed_callables_equal_eager_steps(memory):
    config = configuration(memory)
    if memory == "none":
        config = MemAOPConfig(ratio=1 / 4, selection="topk", memory="none")
    eager, graphed = net(config), net(config)
    sample = batches(1)[0].requires_grad_()
    replay = torch.cuda.make_graphed_callables(graphed, (sample,), num_warmup_iters=WARM_UP)
    # Both start from what the warm-up left behind.
    load_memory_state_dict(eager, copy.deepcopy(memory_state_dict(graphed)))
    for x in batches(7):
        gradients = []
        for call, model in ((eager, eager), (replay, graphed)):
            torch.cuda.manual_seed(5)
            model.zero_grad()
            backward(call, x.clone().requires_grad_())
            gradients.append([p.grad.clone() for p in model.parameters()])
        if config.selection == "topk":
            torch.testing.assert_close(gradients[1], gradients[0], rtol=0.02, atol=1e-4)
    if memory == "subspace":
        assert graphed[0].memory.step == eager[0].memory.step
        ours, theirs = graphed[0].memory.basis, eager[0].memory.basis
        torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("memory", ["none", "signed", "subspace", "projected"])
def test_a_monitor_counts_replays(memory):
    """And what the memories hold stays where it was."""
    model = net(configuration(memory))
    with monitor(model, every=100, starving=1e9) as watch:
        sample = batches(1)[0].requires_grad_()
        for x in batches(WARM_UP):
            backward(model, x)
        addresses = [t.data_ptr() for t in tensors(model)]
        replay = torch.cuda.make_graphed_callables(model, (sample,))
        before = watch.read()["0"]
        for x in batches(5):
            backward(replay, x.requires_grad_())
        after = watch.read()["0"]
    assert [t.data_ptr() for t in tensors(model)] == addresses
    assert all(t.isfinite().all() for t in tensors(model))
    assert after.observations == before.observations + 5
    assert after.skipped == 0
    assert 0 < after.captured <= 1


@pytest.mark.parametrize("memory", ["none", "signed", "subspace", "projected"])
def test_graph_trees_of_a_compiled_model(memory):
    config = configuration(memory)
    eager, compiled = net(config), net(config)
    call = torch.compile(compiled, fullgraph=True, mode="reduce-overhead")
    losses = []
    for function, model in ((eager, eager), (call, compiled)):
        torch.cuda.manual_seed(5)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        values = []
        for x in batches(1) * 12:
            torch.compiler.cudagraph_mark_step_begin()
            loss = function(x).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        losses.append(values)
    assert losses[1][-1] < losses[1][0]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_rates_in_a_tensor_are_followed_by_a_replay():
    model = net(MemAOPConfig(ratio=1 / 4, selection="topk", memory="residual"))
    rate = torch.tensor(0.1, device="cuda")
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, capturable=True)
    attach_optimizer(model, optimizer)
    sample = batches(1)[0].requires_grad_()
    replay = torch.cuda.make_graphed_callables(model, (sample,))
    memory = model[0].memory
    held = memory.x[memory.filled].float().norm()
    rate.mul_(1e-6)
    backward(replay, torch.zeros_like(sample).requires_grad_())
    # √(η_prev/η_now) = 1000, for the rows that were not selected.
    assert memory.x[memory.filled].float().norm() > 100 * held / 4


def test_loss_scale_is_followed_without_waiting_for_the_gpu():
    model = net(MemAOPConfig(ratio=1 / 4, selection="topk", memory="residual")).half()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**4)
    attach_optimizer(model, optimizer, scaler)
    x = batches(1)[0].half()
    scaler.scale(model(x).float().square().mean()).backward()
    memory = model[0].memory
    before, filled = memory.g.clone(), memory.filled.clone()
    scaler.update(2.0**6)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scaler.scale(0 * model(x).float().square().mean()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kept = filled & memory.filled
    torch.testing.assert_close(memory.g[kept], 4 * before[kept], rtol=1e-2, atol=1e-6)
