"""Which steps of which optimizers count."""

import pytest
import torch
from torch import nn

from memaop_triton.auto.optimizer_steps import OptimizerSteps


class Outer(torch.optim.Optimizer):
    """Whose step is one of another optimizer, for some of its parameters."""

    def __init__(self, parameters, inner):
        super().__init__(parameters, {})
        self.inner = inner

    def step(self, closure=None):
        self.inner.step()


@pytest.fixture
def weights():
    found = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for weight in found:
        weight.grad = torch.ones(1)
    return found


@pytest.fixture
def counted(weights):
    class Counted:
        count = 0

        def add(self):
            self.count += 1

    counter = Counted()
    counter.steps = OptimizerSteps(lambda: weights[0], counter.add)
    return counter


def test_steps_are_those_of_the_optimizer_that_holds_the_weight(weights, counted):
    for weight in weights:
        optimizer = torch.optim.SGD([weight], 0.1)
        optimizer.step()
        optimizer.step()
    assert counted.count == 2


@pytest.mark.parametrize("inner_has", [0, 1])
def test_a_step_inside_of_another_is_counted_once_at_the_end_of_it(weights, counted, inner_has):
    """Whether the inner one has the weight or not."""
    inner = torch.optim.SGD([weights[inner_has]], 0.1)
    inner.register_step_post_hook(lambda *_: ends.append(counted.count))
    outer, ends = Outer(weights, inner), []
    for _ in range(3):
        outer.step()
    assert counted.count == 3
    assert ends == [0, 1, 2]
    inner.step()
    assert counted.count == 3 + (inner_has == 0)


def test_a_step_that_failed_is_forgotten(weights, counted):
    optimizer = torch.optim.SGD(weights, 0.1)

    def fails():
        raise RuntimeError("in the closure")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="in the closure"):
            optimizer.step(fails)
    optimizer.step()
    assert counted.count == 1
    with pytest.raises(RuntimeError, match="in the closure"):
        optimizer.step(fails)
    del optimizer
    torch.optim.SGD(weights, 0.1).step()
    assert counted.count == 2


def test_who_listens_no_longer_is_not_called(weights, counted):
    del counted.steps
    torch.optim.SGD(weights, 0.1).step()
    assert counted.count == 0
