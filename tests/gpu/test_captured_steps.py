"""Gradients of captured steps, against the equations in float64."""

import pytest
import torch
from torch import nn

from memaop_triton import MemAOPConfig, Rows, Subspace, convert_, new_memory
from memaop_triton.bench.first_run import oracle
from tests.gpu.helpers import Graph, batches

ROW_MEMORIES = [
    {"selection": selection, "memory": Rows(signed=signed)}
    for selection in ("topk", "randk", "weightedk")
    for signed in (False, True)
]
OTHERS = [
    {},
    {"memory": Subspace(refresh_every=2)},
    {"memory": Subspace(side="grad", refresh_every=2)},
    {"memory": "none"},
    {"selection": "topk", "memory": "none"},
    {"selection": "uniform", "memory": "none"},
]
DRAWS = ("priority", "uniform", "randk", "weightedk")


def name(setting):
    config = MemAOPConfig(**setting)
    every = f"-{config.period}-{config.subspace.side}" if config.subspace else ""
    return f"{config.selection}-{config.memory_name}{every}"


@pytest.mark.parametrize("setting", OTHERS + ROW_MEMORIES, ids=name)
def test_replays_compute_what_the_equations_say(setting, device, shape, half, on_gpu):
    """Each with rows of its own, from the memory that the last one left, with draws of its own."""
    config = MemAOPConfig(ratio=1 / 4, **setting)
    memory = new_memory(config, *shape[1:])
    x, g = (torch.empty_like(a) for a in batches(shape, 1, half, device)[0])
    data = batches(shape, on_gpu(6, 3), half, device)
    x.copy_(data[0][0])
    g.copy_(data[0][1])
    graph = Graph(lambda: oracle.take_step(config, memory, x, g), device)
    chosen = []
    for rows, gradient in data:
        x.copy_(rows)
        g.copy_(gradient)
        step = graph.replay()
        oracle.check_step(step)
        chosen.append(step.watch.selection.indices.tolist())
    if config.selection in DRAWS:
        assert len({tuple(rows) for rows in chosen}) == len(chosen)


@pytest.mark.parametrize("grad_input", ["exact", "sampled", "projected"])
def test_a_captured_layer_learns_like_an_eager_one(grad_input, device, half, on_gpu):
    """Forward, backward and SGD in one graph: the loss falls as far as without it."""
    config = MemAOPConfig(ratio=1 / 2, grad_input=grad_input)
    rows, count, part = on_gpu((512, 60, 0.5), (32, 4, 0.95))
    losses = [train(config, device, half, one, rows, count) for one in (False, True)]
    for first, last in losses:
        assert last < part * first
    assert losses[1][1] == pytest.approx(losses[0][1], rel=0.5)


def train(config, device, dtype, is_captured, rows, count):
    """The loss of the first step and of the last."""
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)).to(device, dtype)
    convert_(net, config)
    x, _ = batches((rows, 16, 16), 1, dtype, device)[0]
    leaf = x.clone().requires_grad_()  # so that dX of the first layer is computed, too

    def step():
        loss = (net(leaf) - x).float().square().mean()
        loss.backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.3 * p.grad
                p.grad.zero_()
        return loss.detach()

    first = float(step())
    call = Graph(step, device).replay if is_captured else step
    for _ in range(count):
        loss = call()
    return first, float(loss)
