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


SCHEDULES = {
    "constant": lambda o: torch.optim.lr_scheduler.ConstantLR(o, factor=1),
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=3, gamma=0.3),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, max_lr=0.2, total_steps=STEPS + 1, cycle_momentum=False
    ),
    "warm-up-from-zero": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: t / 4),
}


@pytest.fixture
def difference(selections):
    """Trains the library and the transcription on the same batches; how far parameters end apart.

    Indices of random policies are handed over in the order of the backward pass; those of topk are
    found twice.
    """

    def train(sizes, config, schedule, batch_sizes=EQUAL, *, attach):
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
        scheduler = SCHEDULES[schedule](optimizer)
        if attach:
            attach_optimizer(model, optimizer)
        for rows in batch_sizes:
            x = torch.randn(rows, sizes[0], dtype=torch.float64)
            y = torch.randn(rows, sizes[-1], dtype=torch.float64)
            rate = optimizer.param_groups[0]["lr"]
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            paper.step(x.numpy(), y.numpy(), rate)
            scheduler.step()
        assert len(selections) == len(batch_sizes) * len(layers)
        assert all(s.indices.unique().numel() == config.k for s in selections)
        ours = [p.detach().numpy() for layer in layers for p in (layer.weight, layer.bias)]
        theirs = itertools.chain(*zip(paper.weights, paper.biases, strict=True))
        return max(np.abs(p - q).max() for p, q in zip(ours, theirs, strict=True))

    return train


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("selection", ["topk", "weightedk", "randk"])
@pytest.mark.parametrize("memory", ["residual", Rows(decay=0.5), "none"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("batch_sizes", [EQUAL, CHANGING], ids=["equal", "changing"])
def test_ten_steps_equal_the_paper(sizes, selection, memory, schedule, batch_sizes, difference):
    config = MemAOPConfig.paper(k=4, selection=selection, memory=memory)
    attach = schedule != "constant"
    assert difference(sizes, config, schedule, batch_sizes, attach=attach) < 1e-10


def test_a_changing_rate_without_attach_optimizer_is_not_the_paper(difference):
    config = MemAOPConfig.paper(k=4)
    assert difference(SIZES["1-layer"], config, "step", attach=False) > 1e-5
