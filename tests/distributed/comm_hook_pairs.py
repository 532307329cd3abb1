"""Models under plain DDP and under FactorAllGather, compared: what its checks share."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memaop_triton import FactorAllGather, convert_
from tests.schemes import flat_config

N = 192
M = 128
CHECKS = []


def check(fn):
    CHECKS.append(fn)
    return fn


def config(**kwargs):
    return flat_config(**{"ratio": 1 / 16, "rank": 4} | kwargs)


def mlp(seed=0):
    """Two weights that are worth gathering, and one that is not."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(N, N), nn.Tanh(), nn.Linear(N, N), nn.Tanh(), nn.Linear(N, 3))


BOTH = ("0.weight", "2.weight")


def rows(count=M, dtype=torch.float32, salt=0):
    """Other numbers in every process."""
    generator = torch.Generator().manual_seed(10 * dist.get_rank() + 1000 * salt)
    return torch.randn(count, N, generator=generator).to(dtype)


def loss_of(model, x):
    return model(x).float().square().mean()


def backward(model, x):
    loss_of(model, x).backward()


def relative(a, b):
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def everywhere(tensor):
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts


class Pair:
    """The same model under plain DDP and under the hook."""

    def __init__(self, build=mlp, cfg=None, wrap=None, **kwargs):
        def model():
            made = convert_(build(), cfg or config())
            return DistributedDataParallel(made, **kwargs)

        self.plain, self.ours = model(), model()
        self.hook = FactorAllGather.register(self.ours)
        self.steps = [self.plain, self.ours if wrap is None else wrap(self.ours)]
        self.replaced = 0
        self.problems = []

    def step(self, run, gathered, tolerance=1e-6, zero=True):
        """`run(model)` with both; the gradients must agree, and only `gathered` be gathered."""
        for ddp, model in zip((self.plain, self.ours), self.steps, strict=True):
            if zero:
                ddp.zero_grad()
            torch.manual_seed(dist.get_rank())
            run(model)
        named = dict(self.ours.module.named_parameters())
        world = dist.get_world_size()
        size = sum(2 * (world - 1) * named[n].numel() * named[n].element_size() for n in gathered)
        found, self.replaced = self.hook.bytes_replaced - self.replaced, self.hook.bytes_replaced
        self.require(found == size // world, f"gathered {found} bytes, not {size // world}")
        for name, p in self.plain.module.named_parameters():
            ours = named[name].grad
            if p.grad is None:
                self.require(ours is None, f"{name} has a gradient")
                continue
            error = relative(ours, p.grad)
            self.require(error <= tolerance, f"{name} differs by {error:.3g}")
            parts = everywhere(ours)
            same = all(torch.equal(part, parts[0]) for part in parts)
            self.require(same, f"{name} differs between processes")
        kept = sum(len(c.factors) for c in self.hook._collected.values())
        self.require(kept == 0, f"{kept} factors were kept")

    def require(self, holds, message):
        if not holds:
            self.problems.append(message)

    def finish(self):
        assert not self.problems, "; ".join(self.problems)


def steps(pair, gathered=BOTH, count=3, tolerance=1e-6, dtype=torch.float32, optimize=True):
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (pair.plain, pair.ours)]
    for number in range(count):
        pair.step(lambda m, n=number: backward(m, rows(dtype=dtype, salt=n)), gathered, tolerance)
        if optimize:
            for optimizer in optimizers:
                optimizer.step()
    pair.finish()
