"""Mixed precision with a loss scaler: scales carry over, and an overflowed step does no harm."""

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
)

ROWS = 48


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 8))


def batches(steps):
    torch.manual_seed(2)
    return [(torch.randn(ROWS, 20), torch.randn(ROWS, 8)) for _ in range(steps)]


class Training:
    """A run whose scaler starts at `scale` and doubles it every `growth` steps; 0 for no scaler."""

    def __init__(self, model, scale, growth=1, follow_scale=True, dtype=None):
        self.model, self.dtype = model, dtype
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=scale or 1.0, growth_interval=growth, enabled=scale != 0
        )
        if memory_state_dict(model):
            attach_optimizer(model, self.optimizer, self.scaler if follow_scale else None)

    def step(self, x, y):
        self.optimizer.zero_grad()
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            out = self.model(x)
        loss = (out.float() - y).square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()

    def run(self, data):
        torch.manual_seed(3)
        return [self.step(x, y) for x, y in data]


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def is_finite(model):
    states = memory_state_dict(model).values()
    tensors = [t for state in states for t in state.values() if isinstance(t, torch.Tensor)]
    return all(t.isfinite().all() for t in tensors)


@pytest.mark.parametrize("memory", ["residual", "signed"])
def test_remembered_rows_follow_the_loss_scale(memory):
    config = MemAOPConfig(ratio=1 / 4, selection="topk", memory=memory)
    runs = []
    for scale, follow_scale in ((0, True), (4.0, True), (4.0, False)):
        model = convert_(net(), config)
        Training(model, scale, follow_scale=follow_scale).run(batches(8))
        runs.append(parameters(model))
    # Every scale is a power of two, so nothing is rounded differently.
    assert all(map(torch.equal, runs[0], runs[1]))
    assert not all(map(torch.equal, runs[0], runs[2]))


def test_loss_scale_survives_a_checkpoint():
    config = MemAOPConfig(ratio=1 / 4, selection="topk", memory="residual")
    model = convert_(net(), config)
    data = batches(8)
    training = Training(model, 4.0)
    training.run(data[:4])
    twin = convert_(net(), config)
    twin.load_state_dict(model.state_dict())
    load_memory_state_dict(twin, copy.deepcopy(memory_state_dict(model)))
    resumed = Training(twin, 1.0)
    resumed.scaler.load_state_dict(training.scaler.state_dict())
    training.run(data[4:])
    resumed.run(data[4:])
    assert all(map(torch.equal, parameters(model), parameters(twin)))


@pytest.mark.parametrize("every", [1, 2, 5])  # more rows than K = 12, or fewer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_overflowed_step_is_skipped_and_training_goes_on(memory_scheme, dtype, every):
    model = convert_(net(), MemAOPConfig(ratio=1 / 4, **memory_scheme))
    training = Training(model, 2.0**12, growth=1000, dtype=dtype)
    data = batches(1) * 60
    losses = training.run(data[:20])
    before = parameters(model)
    x, y = data[0]
    x = x.clone()
    x[::every] = torch.inf  # these rows of X and of every gradient are not finite
    training.step(x, y)
    assert all(map(torch.equal, parameters(model), before))
    assert training.scaler.get_scale() == 2.0**11
    assert is_finite(model)
    for layer in model[::2]:
        if layer.config.row_memory:
            assert not layer.memory.filled[::every].any()
    losses += training.run(data[20:])
    assert is_finite(model)
    assert losses[-1] < losses[19] < losses[0]
