"""What `test_comm_hook.py` runs in several processes: every check, with its outcome in a file.

Each check compares two models that are alike, one under plain DDP and one under FactorAllGather.
A check asserts only after the last collective of its own, so that the processes stay in step.
"""

import json
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memaop_triton import FactorAllGather, convert_
from tests.distributed import comm_hook_passes  # noqa: F401 - adds its checks to CHECKS
from tests.distributed.checks import leave
from tests.distributed.comm_hook_pairs import (
    BOTH,
    CHECKS,
    M,
    N,
    Pair,
    backward,
    check,
    config,
    mlp,
    relative,
    rows,
    steps,
)


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
    pair = Pair()
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
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
