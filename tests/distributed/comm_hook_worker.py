"""What `test_comm_hook.py` runs in several processes: every check, with its outcome in a file.

Each check compares two models that are alike, one under plain DDP and one under FactorAllGather.
A check asserts only after the last collective of its own, so that the processes stay in step.
"""

import contextlib
import json
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
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

    def __init__(self, build=mlp, cfg=None, reuse_local=False, wrap=None, **kwargs):
        def model():
            made = convert_(build(), cfg or config())
            return DistributedDataParallel(made, **kwargs)

        self.plain, self.ours = model(), model()
        self.hook = FactorAllGather.register(self.ours, reuse_local=reuse_local)
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
            if not self.hook.reuse_local:
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


@check
def default():
    steps(Pair(), tolerance=1e-5)


@check
def no_memory():
    steps(Pair(cfg=config(memory="none")), tolerance=1e-5)


@check
def row_memory():
    steps(Pair(cfg=config(memory="signed", selection="weightedk")), count=2, optimize=False)


@check
def sampled_input_gradient():
    steps(Pair(cfg=config(grad_input="sampled")), count=2, optimize=False)


@check
def several_buckets():
    steps(Pair(bucket_cap_mb=0.1), tolerance=1e-5)


@check
def bucket_views():
    steps(Pair(bucket_cap_mb=0.1, gradient_as_bucket_view=True), tolerance=1e-5)


@check
def static_graph():
    steps(Pair(static_graph=True, bucket_cap_mb=0.1), tolerance=1e-5)


@check
def reuse_local():
    steps(Pair(reuse_local=True), tolerance=1e-5)


@check
def float64():
    steps(Pair(lambda: mlp().double()), tolerance=1e-14, dtype=torch.float64, optimize=False)


@check
def bfloat16():
    pair = Pair(lambda: mlp().bfloat16())
    steps(pair, tolerance=0.01, dtype=torch.bfloat16, optimize=False)


@check
def float16():
    pair = Pair(lambda: mlp().half())
    steps(pair, tolerance=0.002, dtype=torch.float16, optimize=False)


def _autocast_backward(model):
    # Backward inside the region too, which reaches the hook.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backward(model, rows())


@check
def autocast():
    for reuse in (False, True):
        pair = Pair(reuse_local=reuse)
        pair.step(_autocast_backward, BOTH, tolerance=0.01)
        pair.finish()


@check
def autocast_in_one_process():
    """The dtypes of the factors differ: nobody can gather."""
    pair = Pair()
    run = _autocast_backward if dist.get_rank() == 0 else lambda m: backward(m, rows())
    pair.step(run, [], tolerance=1e-6)
    pair.finish()


class TwoDtypes(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(N, N, dtype=torch.bfloat16)
        self.b = nn.Linear(N, N)

    def forward(self, x):
        return self.b(self.a(x.bfloat16()).float())


@check
def two_dtypes():
    steps(Pair(TwoDtypes), ("a.weight", "b.weight"), 2, tolerance=0.01, optimize=False)


@check
def batches_of_different_size():
    pair = Pair()
    pair.step(lambda m: backward(m, rows(M - 32 * dist.get_rank())), BOTH)
    pair.step(lambda m: backward(m, rows(0 if dist.get_rank() == 0 else M)), BOTH)
    pair.finish()


@check
def too_many_rows_in_one_process():
    pair = Pair()
    pair.step(lambda m: backward(m, rows(M * (1 + 8 * (dist.get_rank() == 0)))), [])
    pair.step(lambda m: backward(m, rows()), BOTH)
    pair.finish()


class Branches(nn.Module):
    """Uses `b` if `on`, and never `c`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(N, N), nn.Linear(N, N), nn.Linear(N, N)
        self.on = True

    def forward(self, x):
        x = self.a(x)
        return self.b(x) if self.on else x


@check
def layer_unused_in_one_process():
    pair = Pair(Branches, find_unused_parameters=True)
    everything = ("a.weight", "b.weight", "c.weight")
    for number in range(2):
        for model in (pair.plain, pair.ours):
            model.module.on = dist.get_rank() != number
        # The unused gradient is zero everywhere, which takes no factors to say.
        pair.step(lambda m, n=number: backward(m, rows(salt=n)), everything)
    pair.finish()


@check
def micro_batches():
    pair = Pair()

    def run(model, count=2):
        with model.no_sync():
            for number in range(count - 1):
                backward(model, rows(64, salt=number + 1))
        backward(model, rows(64))

    pair.step(run, BOTH)
    pair.step(run, BOTH)
    pair.finish()


@check
def many_micro_batches():
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
    pair.require(0 < max(most) < limit and most[-1] == 0, f"kept {most} bytes")
    pair.step(lambda m: backward(m, rows()), BOTH)
    pair.finish()


@check
def discarded_micro_batch():
    pair = Pair()

    def run(model):
        with model.no_sync():
            backward(model, rows(salt=1))
        model.zero_grad()
        backward(model, rows())

    pair.step(run, [])
    pair.step(lambda m: backward(m, rows()), BOTH)
    pair.finish()


@check
def gradients_not_zeroed():
    pair = Pair()
    pair.step(lambda m: backward(m, rows()), BOTH)
    pair.step(lambda m: backward(m, rows(salt=1)), [], zero=False)
    pair.finish()


@check
def exact_in_one_process():
    """A batch of at most K rows has no factors."""
    pair = Pair(cfg=config(ratio=None, k=8))
    pair.step(lambda m: backward(m, rows(8 if dist.get_rank() == 0 else M)), [])

    def partly(model):
        with model.no_sync():
            backward(model, rows(salt=1))
        backward(model, rows(8 if dist.get_rank() == 1 else M))

    pair.step(partly, [])
    pair.finish()


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


@check
def shared_weight():
    pair = Pair(Tied)
    pair.step(lambda m: backward(m, rows(64)), ["a.weight"])
    for model in (pair.plain, pair.ours):
        model.module.elsewhere = dist.get_rank() == 0
    pair.step(lambda m: backward(m, rows(64)), [])
    pair.finish()


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(N, N)

    def forward(self, x):
        return self.a(torch.tanh(self.a(x)))


@check
def layer_used_twice():
    pair = Pair(Twice)
    pair.step(lambda m: backward(m, rows(64)), ["a.weight"])
    pair.finish()


@check
def bfloat16_used_twice():
    """A rounded sum of two passes is not what the factors say."""
    pair = Pair(lambda: Twice().bfloat16())
    pair.step(lambda m: backward(m, rows(64, torch.bfloat16)), [], tolerance=0)
    pair.finish()


@check
def regulariser():
    pair = Pair()

    def run(model, factor):
        weight = model.module[0].weight
        size = factor * dist.get_rank() * weight.square().sum()
        (loss_of(model, rows()) + size).backward()

    pair.step(lambda m: run(m, 0), BOTH)
    for factor in (1.0, 1e-5):
        pair.step(lambda m, f=factor: run(m, f), ["2.weight"])
    pair.finish()


@check
def gradient_hook():
    pair = Pair()
    for model in (pair.plain, pair.ours):
        model.module[2].weight.register_hook(lambda g: 1.001 * g)
    pair.step(lambda m: backward(m, rows()), ["0.weight"])
    pair.finish()


@check
def gradient_taken_apart():
    """Passes whose result is not added to the gradient."""
    pair = Pair()

    def run(model):
        torch.autograd.grad(loss_of(model.module, rows(salt=1)), model.module[2].weight)
        backward(model, rows())

    pair.step(run, ["0.weight"])
    pair.finish()


@check
def evaluation_mode():
    pair = Pair()
    for model in (pair.plain, pair.ours):
        model.module[2].train(dist.get_rank() == 0)
    pair.step(lambda m: backward(m, rows()), ["0.weight"])
    pair.finish()


@check
def frozen_weight():
    def build():
        model = mlp()
        model[0].weight.requires_grad_(False)
        return model

    pair = Pair(build)
    pair.step(lambda m: backward(m, rows()), ["2.weight"])
    pair.finish()


@check
def transposed_storage():
    def build():
        model = mlp()
        model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
        return model

    pair = Pair(build)
    # Its part of the bucket has the order of the storage.
    pair.step(lambda m: backward(m, rows()), ["2.weight"])
    pair.finish()


@check
def not_finite():
    pair = Pair()
    x = rows()
    if dist.get_rank() == 0:
        x[3, 5] = float("nan")
    for model in (pair.plain, pair.ours):
        backward(model, x)
    for p, q in zip(pair.plain.parameters(), pair.ours.parameters(), strict=True):
        pair.require(q.grad.isnan().equal(p.grad.isnan()), "NaN in other places")
    pair.require(pair.ours.module[0].weight.grad.isnan().any().item(), "no NaN")
    pair.finish()


@check
def not_finite_from_elsewhere():
    """NaN agrees with nothing, not with NaN either."""
    pair = Pair()
    for model in (pair.plain, pair.ours):
        if dist.get_rank() == 0:
            model.module[2].weight.register_hook(lambda g: g * float("nan"))
        backward(model, rows())
    nan = [m.module[2].weight.grad.isnan().all().item() for m in (pair.plain, pair.ours)]
    pair.require(nan == [True, True], f"all NaN: {nan}")
    pair.finish()


@check
def compiled():
    pair = Pair(wrap=lambda m: torch.compile(m, backend="aot_eager"))
    steps(pair, tolerance=1e-5, count=2)


@check
def uneven_inputs():
    """Processes that have run out of batches contribute nothing."""
    pair = Pair()
    grads = []
    for model in (pair.plain, pair.ours):
        torch.manual_seed(dist.get_rank())
        with model.join():
            for number in range(1 + dist.get_rank()):
                model.zero_grad()
                backward(model, rows(salt=number))
        grads.append([p.grad for p in model.parameters()])
    for p, q in zip(*grads, strict=True):
        pair.require(relative(q, p) <= 1e-6, f"differs by {relative(q, p):.3g}")
    pair.require(pair.hook.bytes_replaced > 0, "nothing was gathered")
    pair.finish()


@check
def bytes_counted():
    pair = Pair(cfg=config(memory="none"))
    backward(pair.ours, rows(M - 32 * dist.get_rank()))
    others = dist.get_world_size() - 1
    # Two weights of M/16 rows in float32, padded to the most, and two int64 for all three.
    assert pair.hook.bytes_sent == others * (2 * (M // 16) * 2 * N * 4 + 3 * 16)
    assert pair.hook.bytes_replaced == 2 * (2 * others * N * N * 4 // (others + 1))


def _raised(error, call):
    try:
        call()
    except error as caught:
        return str(caught)
    return f"no {error.__name__}"


@check
def errors():
    register = FactorAllGather.register
    dense = DistributedDataParallel(mlp())
    odd = mlp()
    convert_(odd, config(), filter_fn=lambda _, name: name != str(2 * (dist.get_rank() == 1)))
    odd = DistributedDataParallel(odd)
    pair = Pair()
    taken = DistributedDataParallel(convert_(mlp(), config()))
    taken.register_comm_hook(None, lambda state, bucket: None)
    messages = [
        _raised(TypeError, lambda: register(mlp())),
        _raised(ValueError, lambda: register(dense)),
        _raised(ValueError, lambda: register(pair.ours)),
        _raised(ValueError, lambda: register(odd)),
        _raised(RuntimeError, lambda: register(taken)),
    ]
    wanted = [
        "ddp must be a DistributedDataParallel, got Sequential",
        "ddp has no converted layer",
        "the factors of layer '0' are collected already",
        "process 1 differs from process 0 in [('0', (192, 192)), ('2', (192, 192))]",
        "register_comm_hook",
    ]
    for message, part in zip(messages, wanted, strict=True):
        assert part in message, message
    # A refused registration leaves nothing behind.
    assert all(m.layer_state.factors is None for m in (taken.module[0], taken.module[2]))


def main(folder):
    warnings.simplefilter("error")
    # Not ours: what torch says of its own hooks and compiler.
    warnings.filterwarnings("ignore", module="torch")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    outcomes = {}
    for fn in CHECKS:
        outcomes[fn.__name__] = ""
        try:
            fn()
        except AssertionError:
            outcomes[fn.__name__] = traceback.format_exc()
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(outcomes))
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
