"""Trainings in several processes, whose clocks say different things."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from memaop_triton import MemAOPConfig, convert_
from tests.auto.training import Training
from tests.distributed import checks

AUTO = MemAOPConfig(ratio="auto", memory="none")
FAST = {1 / 2: 0.6, 1 / 4: 0.35, 1 / 8: 0.2, 1 / 16: 0.15}
EASY, HARD = {"rows": 512, "noise": 0.0}, {"rows": 16, "noise": 30.0}


def rank():
    return dist.get_rank()


def fast(ratio):
    return FAST.get(ratio, 1.0)


def never_faster(ratio):
    return 1.02


def own_time(ratio):
    """Sampling is much faster in the first process only, so by itself the other would not."""
    return fast(ratio) if rank() == 0 else never_faster(ratio)


def sharded(model):
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


WRAPPERS = {"DDP": DistributedDataParallel, "FSDP": sharded}


class Run(Training):
    """Each step accumulates two backward passes; `history` has what was decided after it."""

    def __init__(self, patch, task=EASY, true=own_time, wrap=DistributedDataParallel, **options):
        super().__init__(patch, **task, true=true, wrap=wrap, **options)
        checks.seed()
        self.history = []

    def backward(self):
        with self.without_exchange():
            self.loss().backward()
        self.loss().backward()

    @contextlib.contextmanager
    def without_exchange(self):
        if isinstance(self.model, DistributedDataParallel):
            with self.model.no_sync():
                yield
        elif hasattr(self.model, "set_requires_gradient_sync"):
            self.model.set_requires_gradient_sync(False)
            yield
            self.model.set_requires_gradient_sync(True)
        else:
            yield

    def step(self, count=1):
        for _ in range(count):
            super().step()
            decided = self.controller
            is_native = [layer.layer_state.is_native for layer in self.linears]
            ratios = [layer.config.ratio for layer in self.linears]
            self.history.append(
                (decided.phase, dict(decided.shares), decided.realised, ratios, is_native)
            )


@contextlib.contextmanager
def running(*args, **options):
    with pytest.MonkeyPatch.context() as patch:
        yield Run(patch, *args, **options)


def gathered(value):
    """That of every process."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def assert_alike(value):
    first, *others = gathered(value)
    assert all(other == first for other in others)


class Plain:
    """Two layers that no wrapper handles, trained with given outer products."""

    def __init__(self, config=AUTO, wrap=lambda model: model, **options):
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"0": nn.Linear(8, 6), "1": nn.Linear(8, 6)})
        self.model = wrap(convert_(self.model, config, **options))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01)
        self.controller = self.model["0"].layer_state.controller
        checks.seed()

    def step(self, names=("0", "1"), scale=1.0):
        """The gradients of the layers that were used."""
        self.optimizer.zero_grad()
        for name in names:
            y = self.model[name](torch.randn(64, 8))
            y = y.to_local() if hasattr(y, "to_local") else y
            y.backward(scale * torch.randn_like(y))
        grads = {name: self.model[name].weight.grad for name in names}
        self.optimizer.zero_grad()
        self.optimizer.step()
        return grads
