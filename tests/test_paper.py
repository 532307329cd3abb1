import itertools

import numpy as np
import pytest
import torch
from torch import nn

from memaop_triton import MemAOPConfig, MemAOPLinear, Rows, attach_optimizer

STEPS = 10
RATE = 0.05
SIZES = {"1-layer": (5, 3), "3-layer": (5, 7, 6, 2)}
EQUAL = (12,) * STEPS
CHANGING = (12, 12, 7, 12, 16, 5, 16, 9, 12, 12)


class PaperNet:
    """The paper's algorithm in float64 numpy for a tanh net with a mean squared error."""

    def __init__(self, layers, k, with_memory, decay, pick):
        self.weights = [layer.weight.detach().numpy().copy() for layer in layers]
        self.biases = [layer.bias.detach().numpy().copy() for layer in layers]
        self.memories = [
            (np.zeros((0, w.shape[1])), np.zeros((0, w.shape[0]))) for w in self.weights
        ]
        self.k, self.with_memory, self.decay, self.pick = k, with_memory, decay, pick

    def step(self, x, y, rate):
        inputs = [x]
        for w, b in zip(self.weights, self.biases, strict=True):
            out = inputs[-1] @ w.T + b
            inputs.append(np.tanh(out))
        g = 2 * (out - y) / out.size
        for layer in reversed(range(len(self.weights))):
            g_below = (g @ self.weights[layer]) * (1 - inputs[layer] ** 2)
            self.update(layer, inputs[layer], g, rate)
            g = g_below

    def update(self, layer, x, g, rate):
        rows = len(x)
        a, b = (self.grown(m, rows) for m in self.memories[layer])
        a[:rows] += np.sqrt(rate) * x
        b[:rows] += np.sqrt(rate) * g
        chosen = self.pick(a[:rows], b[:rows], self.k)
        self.weights[layer] -= b[chosen].T @ a[chosen]
        self.biases[layer] -= rate * g.sum(0)
        a[chosen] = 0
        b[chosen] = 0
        keep = np.sqrt(self.decay) if self.with_memory else 0
        self.memories[layer] = (keep * a, keep * b)

    @staticmethod
    def grown(memory, rows):
        missing = max(0, rows - len(memory))
        return np.concatenate([memory, np.zeros((missing, memory.shape[1]))])


def largest(a, b, k):
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.argsort(-norms)[:k]


def net(sizes):
    layers = [MemAOPLinear(n, p, config=MemAOPConfig(k=1)) for n, p in itertools.pairwise(sizes)]
    activations = [nn.Tanh() for _ in layers]
    return nn.Sequential(*itertools.chain(*zip(layers, activations, strict=True)))[:-1].double()


@pytest.fixture
def both(selections):
    """Trains the library and the transcription on the same batches; the pairs of parameters.

    Indices of random policies are handed over in the order of the backward pass; those of topk are
    found twice.
    """

    def train(sizes, config, batch_sizes=EQUAL, schedule=None, attach=True):
        model = net(sizes)
        layers = [module for module in model if isinstance(module, MemAOPLinear)]
        for layer in layers:
            layer._set_config(config)
        draws = iter(selections)

        def recorded(a, b, k):
            return next(draws).indices.numpy()

        pick = largest if config.selection == "topk" else recorded
        rows = config.row_memory
        decay = 1.0 if rows is None else rows.decay
        paper = PaperNet(layers, config.k, rows is not None, decay, pick)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        scheduler = schedule(optimizer) if schedule else None
        if attach:
            attach_optimizer(model, optimizer)
        rates = []
        for rows in batch_sizes:
            x = torch.randn(rows, sizes[0], dtype=torch.float64)
            y = torch.randn(rows, sizes[-1], dtype=torch.float64)
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            paper.step(x.numpy(), y.numpy(), rates[-1])
            if scheduler:
                scheduler.step()
        assert len(selections) == len(batch_sizes) * len(layers)
        assert all(s.indices.unique().numel() == config.k for s in selections)
        ours = [p.detach().numpy() for layer in layers for p in (layer.weight, layer.bias)]
        theirs = itertools.chain(*zip(paper.weights, paper.biases, strict=True))
        return max(np.abs(p - q).max() for p, q in zip(ours, theirs, strict=True)), rates

    return train


SCHEDULES = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=3, gamma=0.3),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, max_lr=0.2, total_steps=STEPS + 1, cycle_momentum=False
    ),
    "warm-up-from-zero": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: t / 4),
}


@pytest.mark.parametrize("net_size", SIZES)
@pytest.mark.parametrize("selection", ["topk", "weightedk", "randk"])
@pytest.mark.parametrize(("memory", "decay"), [(True, 1.0), (True, 0.5), (False, 1.0)])
def test_ten_steps_at_a_constant_rate_equal_the_paper(net_size, selection, memory, decay, both):
    config = MemAOPConfig.paper(
        k=4, selection=selection, memory=Rows(decay=decay) if memory else None
    )
    error, _ = both(SIZES[net_size], config, attach=False)
    assert error < 1e-10


@pytest.mark.parametrize("net_size", SIZES)
@pytest.mark.parametrize("selection", ["topk", "weightedk", "randk"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_ten_steps_at_a_changing_rate_equal_the_paper(net_size, selection, schedule, decay, both):
    config = MemAOPConfig.paper(k=4, selection=selection, memory=Rows(decay=decay))
    error, rates = both(SIZES[net_size], config, schedule=SCHEDULES[schedule])
    assert len(set(rates)) > 2
    assert (rates[0] == 0) == (schedule == "warm-up-from-zero")
    assert error < 1e-10


def test_a_changing_rate_without_attach_optimizer_is_not_the_paper(both):
    config = MemAOPConfig.paper(k=4)
    error, _ = both(SIZES["1-layer"], config, schedule=SCHEDULES["step"], attach=False)
    assert error > 1e-5


@pytest.mark.parametrize("selection", ["topk", "weightedk", "randk"])
@pytest.mark.parametrize("memory", ["residual", "none"])
@pytest.mark.parametrize("schedule", [None, "step"])
def test_batch_sizes_that_change_equal_the_paper(selection, memory, schedule, both):
    config = MemAOPConfig.paper(k=4, selection=selection, memory=memory)
    error, _ = both(SIZES["3-layer"], config, CHANGING, SCHEDULES.get(schedule))
    assert error < 1e-10


def test_decay_reaches_slots_that_a_shorter_batch_leaves_out(both):
    config = MemAOPConfig.paper(k=4, memory=Rows(decay=0.5))
    error, _ = both(SIZES["1-layer"], config, CHANGING)
    assert error < 1e-10


@pytest.mark.parametrize("selection", ["topk", "weightedk", "randk"])
def test_all_rows_with_memory_are_plain_gradient_descent(selection, train_step):
    config = MemAOPConfig.paper(k=99, selection=selection)
    dense = nn.Linear(5, 3)
    ours = MemAOPLinear(5, 3, config=config)
    ours.load_state_dict(dense.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=RATE) for m in (dense, ours)]
    for _ in range(3):
        x = torch.randn(12, 5)
        for model, optimizer in zip((dense, ours), optimizers, strict=True):
            train_step(model, x, optimizer=optimizer)
    torch.testing.assert_close(ours.weight, dense.weight)
    assert ours.memory.nbytes == 0
