"""Checks of FactorAllGather where a weight's gradient comes from several or from other passes."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from tests.distributed.comm_hook import BOTH, M, N, Pair, backward, loss_of, rows


def check_micro_batches():
    pair = Pair()

    def run(model):
        with model.no_sync():
            backward(model, rows(64, salt=1))
        backward(model, rows(64))

    pair.step(run, BOTH)
    pair.step(run, BOTH)


def check_many_micro_batches():
    """Factors that cannot be smaller any more are not kept."""
    pair = Pair()
    most = []

    def run(model):
        with model.no_sync():
            for number in range(12):
                backward(model, rows(salt=number))
                if model is pair.ours:
                    kept = [c.factors for c in pair.hook._collected.values()]
                    most.append(max(sum(x.nbytes + g.nbytes for x, g in f) for f in kept))
        backward(model, rows())

    pair.step(run, [])
    limit = 4 * N * N / dist.get_world_size()
    assert 0 < max(most) < limit
    assert most[-1] == 0
    pair.step(lambda m: backward(m, rows()), BOTH)


def check_discarded_micro_batch():
    pair = Pair()

    def run(model):
        with model.no_sync():
            backward(model, rows(salt=1))
        model.zero_grad()
        backward(model, rows())

    pair.step(run, [])
    pair.step(lambda m: backward(m, rows()), BOTH)


def check_gradients_not_zeroed():
    pair = Pair()
    pair.step(lambda m: backward(m, rows()), BOTH)
    pair.step(lambda m: backward(m, rows(salt=1)), [], zero=False)


def check_exact_in_one_process():
    """A batch of at most K rows has no factors."""
    pair = Pair(settings={"ratio": None, "k": 8})
    pair.step(lambda m: backward(m, rows(8 if dist.get_rank() == 0 else M)), [])

    def partly(model):
        with model.no_sync():
            backward(model, rows(salt=1))
        backward(model, rows(8 if dist.get_rank() == 1 else M))

    pair.step(partly, [])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(N, N), nn.Linear(N, N)
        self.b.weight = self.a.weight
        self.elsewhere = False

    def forward(self, x):
        x = self.b(torch.tanh(self.a(x)))
        return F.linear(x, self.a.weight) if self.elsewhere else x


def check_shared_weight():
    pair = Pair(Tied)
    pair.step(lambda m: backward(m, rows(64)), ["a.weight"])
    for model in (pair.plain, pair.ours):
        model.module.elsewhere = dist.get_rank() == 0
    pair.step(lambda m: backward(m, rows(64)), [])


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(N, N)

    def forward(self, x):
        return self.a(torch.tanh(self.a(x)))


def check_layer_used_twice():
    Pair(Twice).step(lambda m: backward(m, rows(64)), ["a.weight"])


def check_bfloat16_used_twice():
    """A rounded sum of two passes is not what the factors say."""
    pair = Pair(lambda: Twice().bfloat16())
    pair.step(lambda m: backward(m, rows(64, torch.bfloat16)), [], tolerance=0)


def check_regulariser():
    pair = Pair()

    def run(model, factor):
        weight = model.module[0].weight
        size = factor * dist.get_rank() * weight.square().sum()
        (loss_of(model, rows()) + size).backward()

    pair.step(lambda m: run(m, 0), BOTH)
    for factor in (1.0, 1e-5):
        pair.step(lambda m, f=factor: run(m, f), ["2.weight"])


def check_gradient_hook():
    pair = Pair()
    for model in (pair.plain, pair.ours):
        model.module[2].weight.register_hook(lambda g: 1.001 * g)
    pair.step(lambda m: backward(m, rows()), ["0.weight"])


def check_gradient_taken_apart():
    """Passes whose result is not added to the gradient."""
    pair = Pair()

    def run(model):
        torch.autograd.grad(loss_of(model.module, rows(salt=1)), model.module[2].weight)
        backward(model, rows())

    pair.step(run, ["0.weight"])
