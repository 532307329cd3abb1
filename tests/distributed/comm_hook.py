"""FactorAllGather: two models that are alike, one under plain DDP and one under the hook."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from memaop_triton import FactorAllGather, convert_
from tests.distributed.checks import case, everywhere
from tests.schemes import flat_config

N = 192
M = 128
BOTH = ("0.weight", "2.weight")


def config(**settings):
    return flat_config(**{"ratio": 1 / 16, "rank": 4} | settings)


def mlp():
    """Two weights that are worth gathering, and one that is not."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(N, N), nn.Tanh(), nn.Linear(N, N), nn.Tanh(), nn.Linear(N, 3))


class Used(nn.ModuleList):
    """Layers that are used as `use(layers, x)` says."""

    def __init__(self, use, *dtypes):
        torch.manual_seed(0)
        super().__init__(nn.Linear(N, N, dtype=dtype) for dtype in dtypes)
        self.use, self.elsewhere = use, False

    def forward(self, x):
        return self.use(self, x)


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


class Pair:
    """The same model under plain DDP and under the hook."""

    def __init__(self, build=mlp, settings=None, wrap=lambda model: model, **options):
        self.plain, self.ours = (
            DistributedDataParallel(convert_(build(), config(**settings or {})), **options)
            for _ in range(2)
        )
        self.hook = FactorAllGather.register(self.ours)
        self.steps = self.plain, wrap(self.ours)
        self.replaced = 0

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
        assert found == size // world
        for name, p in self.plain.module.named_parameters():
            ours = named[name].grad
            if p.grad is None:
                assert ours is None, name
                continue
            error = relative(ours, p.grad)
            assert error <= tolerance, f"{name} differs by {error:.3g}"
            parts = everywhere(ours)
            assert all(torch.equal(part, parts[0]) for part in parts), name
        assert not any(collected.factors for collected in self.hook._collected.values())

    def train(self, gathered=BOTH, count=3, tolerance=1e-5, dtype=torch.float32, lr=0.1):
        optimizers = [torch.optim.SGD(m.parameters(), lr=lr) for m in (self.plain, self.ours)]
        for number in range(count):
            x = rows(dtype=dtype, salt=number)
            self.step(lambda model, x=x: backward(model, x), gathered, tolerance)
            for optimizer in optimizers:
                optimizer.step()


def check_training_equals_that_of_plain_ddp():
    for options in (
        {"settings": {}},
        {"settings": {"memory": "none"}},
        {"settings": {"memory": "signed", "selection": "weightedk"}},
        {"settings": {"grad_input": "sampled"}},
        {"bucket_cap_mb": 0.1},
        {"bucket_cap_mb": 0.1, "gradient_as_bucket_view": True},
        {"bucket_cap_mb": 0.1, "static_graph": True},
        {"wrap": lambda model: torch.compile(model, backend="aot_eager")},
    ):
        with case(options):
            Pair(**options).train()


def check_dtypes():
    for dtype, tolerance in (
        (torch.float64, 1e-14),
        (torch.bfloat16, 0.01),
        (torch.float16, 0.002),
    ):
        with case(dtype):
            pair = Pair(lambda dtype=dtype: mlp().to(dtype))
            pair.train(tolerance=tolerance, dtype=dtype, lr=0)

    def casting(layers, x):
        return layers[1](layers[0](x.bfloat16()).float())

    pair = Pair(lambda: Used(casting, torch.bfloat16, torch.float32))
    pair.train(("0.weight", "1.weight"), 2, tolerance=0.01, lr=0)


def check_autocast():
    def run(model):
        # Backward inside the region too, which reaches the hook.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            backward(model, rows())

    Pair().step(run, BOTH, tolerance=0.01)
    # In one process only: the dtypes of the factors differ, and nobody can gather.
    Pair().step(run if dist.get_rank() == 0 else lambda m: backward(m, rows()), [])


def check_batches_of_different_size():
    pair, is_first = Pair(), dist.get_rank() == 0
    pair.step(lambda m: backward(m, rows(M - 32 * dist.get_rank())), BOTH)
    pair.step(lambda m: backward(m, rows(0 if is_first else M)), BOTH)
    # Too many rows in one process.
    pair.step(lambda m: backward(m, rows(9 * M if is_first else M)), [])
    pair.step(lambda m: backward(m, rows()), BOTH)


def check_layer_unused_in_one_process():
    """The second layer is used if it is `on`, the third one never."""

    def branches(layers, x):
        x = layers[0](x)
        return layers[1](x) if layers.on else x

    pair = Pair(lambda: Used(branches, *3 * [torch.float32]), find_unused_parameters=True)
    everything = ("0.weight", "1.weight", "2.weight")
    for number in range(2):
        for model in (pair.plain, pair.ours):
            model.module.on = dist.get_rank() != number
        # The unused gradient is zero everywhere, which takes no factors to say.
        pair.step(lambda m, n=number: backward(m, rows(salt=n)), everything)


def check_weights_that_are_not_gathered():
    def frozen(model):
        model[0].weight.requires_grad_(False)

    def transposed(model):
        """Its part of the bucket has the order of the storage."""
        model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())

    def evaluated_in_one_process(model):
        model[0].train(dist.get_rank() == 0)

    def with_a_hook(model):
        model[0].weight.register_hook(lambda g: 1.001 * g)

    for change in (frozen, transposed, evaluated_in_one_process, with_a_hook):

        def changed(change=change):
            model = mlp()
            change(model)
            return model

        with case(change.__name__):
            Pair(changed).step(lambda m: backward(m, rows()), ["2.weight"])


def check_not_finite():
    for source in ("rows", "a hook"):  # NaN agrees with nothing, not with NaN either
        pair, x = Pair(), rows()
        if source == "rows" and dist.get_rank() == 0:
            x[3, 5] = float("nan")
        for model in (pair.plain, pair.ours):
            if source == "a hook" and dist.get_rank() == 0:
                model.module[0].weight.register_hook(lambda g: g * float("nan"))
            backward(model, x)
        for p, q in zip(pair.plain.parameters(), pair.ours.parameters(), strict=True):
            assert q.grad.isnan().equal(p.grad.isnan())
        assert pair.ours.module[0].weight.grad.isnan().any()


def check_uneven_inputs():
    """Processes that have run out of batches contribute nothing."""
    pair = Pair()
    for model in (pair.plain, pair.ours):
        torch.manual_seed(dist.get_rank())
        with model.join():
            for number in range(1 + dist.get_rank()):
                model.zero_grad()
                backward(model, rows(salt=number))
    for p, q in zip(pair.plain.parameters(), pair.ours.parameters(), strict=True):
        assert relative(q.grad, p.grad) <= 1e-6
    assert pair.hook.bytes_replaced > 0


def check_bytes_counted():
    pair = Pair(settings={"memory": "none"})
    backward(pair.ours, rows(M - 32 * dist.get_rank()))
    others = dist.get_world_size() - 1
    # Two weights of M/16 rows in float32, padded to the most, and two int64 for all three.
    assert pair.hook.bytes_sent == others * (2 * (M // 16) * 2 * N * 4 + 3 * 16)
    assert pair.hook.bytes_replaced == 2 * (2 * others * N * N * 4 // (others + 1))


def check_errors():
    odd = mlp()
    convert_(odd, config(), filter_fn=lambda _, name: name != str(2 * (dist.get_rank() == 1)))
    taken = DistributedDataParallel(convert_(mlp(), config()))
    taken.register_comm_hook(None, lambda state, bucket: None)
    for model, error, message in (
        (mlp(), TypeError, "ddp must be a DistributedDataParallel, got Sequential"),
        (DistributedDataParallel(mlp()), ValueError, "ddp has no converted layer"),
        (Pair().ours, ValueError, "the factors of layer '0' are collected already"),
        (DistributedDataParallel(odd), ValueError, r"process 1 differs from.*\('0', \(192, 192\)"),
        (taken, RuntimeError, "register_comm_hook"),
    ):
        with pytest.raises(error, match=message):
            FactorAllGather.register(model)
    # A refused registration leaves nothing behind.
    assert all(m.layer_state.factors is None for m in (taken.module[0], taken.module[2]))


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
    assert 0 < max(most) < 4 * N * N / dist.get_world_size()
    assert most[-1] == 0
    pair.step(lambda m: backward(m, rows()), BOTH)


def check_gradients_that_are_not_the_sum_of_the_passes():
    def discarded(model):
        with model.no_sync():
            backward(model, rows(salt=1))
        model.zero_grad()
        backward(model, rows())

    def taken_apart(model):
        torch.autograd.grad(loss_of(model.module, rows(salt=1)), model.module[2].weight)
        backward(model, rows())

    def regularised(model, factor):
        weight = model.module[0].weight
        size = factor * dist.get_rank() * weight.square().sum()
        (loss_of(model, rows()) + size).backward()

    pair = Pair()
    pair.step(discarded, [])
    pair.step(lambda m: backward(m, rows()), BOTH)
    pair.step(lambda m: backward(m, rows(salt=1)), [], zero=False)
    pair.step(taken_apart, ["0.weight"])
    pair.step(lambda m: regularised(m, 0), BOTH)
    for factor in (1.0, 1e-5):
        pair.step(lambda m, f=factor: regularised(m, f), ["2.weight"])


def check_exact_in_one_process():
    """A batch of at most K rows has no factors."""
    pair = Pair(settings={"ratio": None, "k": 8})
    pair.step(lambda m: backward(m, rows(8 if dist.get_rank() == 0 else M)), [])

    def partly(model):
        with model.no_sync():
            backward(model, rows(salt=1))
        backward(model, rows(8 if dist.get_rank() == 1 else M))

    pair.step(partly, [])


def check_weight_used_twice():
    def twice(layers, x):
        x = layers[-1](torch.tanh(layers[0](x)))
        return F.linear(x, layers[0].weight) if layers.elsewhere else x

    def tied():
        model = Used(twice, torch.float32, torch.float32)
        model[1].weight = model[0].weight
        return model

    def one_layer(dtype=torch.float32):
        return Used(twice, dtype)

    pair = Pair(tied)
    pair.step(lambda m: backward(m, rows(64)), ["0.weight"])
    Pair(one_layer).step(lambda m: backward(m, rows(64)), ["0.weight"])
    # A rounded sum of two passes is not what the factors say.
    half = Pair(lambda: one_layer(torch.bfloat16))
    half.step(lambda m: backward(m, rows(64, torch.bfloat16)), [], tolerance=0)
    for model in (pair.plain, pair.ours):
        model.module.elsewhere = dist.get_rank() == 0
    pair.step(lambda m: backward(m, rows(64)), [])
