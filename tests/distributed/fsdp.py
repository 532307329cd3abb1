"""Fully sharded models: over two processes, or over two of four (HSDP)."""

import copy
import functools
import itertools

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from memaop_triton import (
    MemAOPConfig,
    MemAOPLinear,
    attach_optimizer,
    compress_saved,
    load_memory_state_dict,
    memory_state_dict,
    revert_,
)
from tests.distributed import checks
from tests.distributed.checks import PAPER, batch, converted, everywhere, mlp, whole

ROWS = 20
ROUNDED = MemAOPConfig(ratio=1, memory="none", stash="int8")


@functools.cache
def mesh():
    """All processes in a row, or two by two."""
    world = dist.get_world_size()
    if world < 4:
        return init_device_mesh("cpu", (world,))
    return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))


def blocks(dtype=torch.float64):
    """Two blocks of two layers each."""
    model = nn.Sequential(mlp(dtype, sizes=(12, 8, 12)), mlp(dtype, sizes=(12, 8, 6), model_seed=1))
    checks.seed()
    return model


def linears(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def sharded(model, convert_first=True, by_layer=False, config=PAPER, **options):
    """`model` with its blocks, or each layer, and the root fully sharded."""
    model = copy.deepcopy(model)
    if convert_first:
        converted(model, config)
    for module in linears(model) if by_layer else model:
        fully_shard(module, mesh=mesh(), **options)
    fully_shard(model, mesh=mesh(), **options)
    return model if convert_first else converted(model, config)


def own_batch(step, dtype=torch.float64):
    """Another one in each process, which stands for a part of one large batch."""
    return batch(ROWS, 12, step=100 * dist.get_rank() + step, dtype=dtype)


def mean_over_processes(grad):
    return everywhere(grad).mean(0)


def assert_rounds_only(ours):
    """Gradients are those of dense layers, but for the rounding of what is kept of the inputs."""
    reference, x = blocks(), own_batch(0)
    for model in (ours, reference):
        model(x).square().mean().backward()
    errors = []
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        exact = mean_over_processes(theirs.grad)
        errors.append((whole(mine.grad) - exact).norm() / exact.norm())
    assert 1e-6 < max(errors) < 0.02


def wide_blocks():
    """Two, whose activations are worth rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(2)))
    checks.seed()
    return model


def assert_rounds_what_is_saved(ours, module):
    """Gradients of `ours`, `wide_blocks` in a wrapper, before and while `module` is compressed."""
    reference, x = wide_blocks(), batch(512, 64, step=dist.get_rank(), dtype=torch.float32)
    reference(x).square().mean().backward()
    exact = [mean_over_processes(p.grad) for p in reference.parameters()]
    for is_compressed in (False, True):
        ours.zero_grad()
        compressed = compress_saved(module) if is_compressed else None
        ours(x).square().mean().backward()
        for mine, theirs in zip(ours.parameters(), exact, strict=True):
            error = (whole(mine.grad) - theirs).norm() / theirs.norm()
            assert (1e-5 if is_compressed else 0) <= error < (0.02 if is_compressed else 1e-5)
    # Two inputs of a GELU and what is between the blocks; no Parameter, and not the batch.
    assert compressed.exact_bytes == 3 * x.nbytes


def assert_trains_like_single_processes(ours, reference, steps=3, dtype=torch.float64):
    """Gradients are the means of those that every process computes alone on its batch."""
    trainers = []
    for model in (ours, reference):
        trainers.append(torch.optim.SGD(model.parameters(), lr=0.01))
        attach_optimizer(model, trainers[-1])
    for step in range(steps):
        x = own_batch(step, dtype)
        for model in (ours, reference):
            model.zero_grad()
            model(x).square().mean().backward()
        for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
            theirs.grad = mean_over_processes(theirs.grad)
            torch.testing.assert_close(whole(mine.grad), theirs.grad)
        for mine, theirs in zip(linears(ours), linears(reference), strict=True):
            assert_same_memory(mine.memory, theirs.memory)
        for optimizer in trainers:
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.5


def assert_same_memory(mine, theirs):
    mine, theirs = mine.state_dict(), theirs.state_dict()
    assert mine.keys() == theirs.keys()
    for name in ("x", "g", "filled", "learning_rate"):
        torch.testing.assert_close(mine[name], theirs[name])
    assert not checks.same_everywhere(mine["x"])


def check_gradients_are_the_means_of_single_processes():
    for convert_first, by_layer, reshard in itertools.product((True, False), repeat=3):
        ours = sharded(blocks(), convert_first, by_layer, reshard_after_forward=reshard)
        assert all(isinstance(layer, MemAOPLinear) for layer in linears(ours))
        assert all(isinstance(layer, FSDPModule) is by_layer for layer in linears(ours))
        assert_trains_like_single_processes(ours, converted(blocks()))


def check_mixed_precision_computes_in_the_parameters_dtype():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ours = sharded(blocks(torch.float32), mp_policy=policy)
    reference = converted(blocks(torch.float32).bfloat16())
    x = own_batch(0, torch.float32)
    ours(x).square().mean().backward()
    reference(x.bfloat16()).square().mean().backward()
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32
        torch.testing.assert_close(whole(mine.grad), mean_over_processes(theirs.grad.float()))
    for layer in linears(ours):
        assert layer.memory.x.dtype == torch.bfloat16


def check_memories_are_saved_and_continue():
    first, second = (sharded(blocks(), by_layer=by_layer) for by_layer in (False, True))
    for step in range(2):
        first(own_batch(step)).square().mean().backward()
    state = copy.deepcopy(memory_state_dict(first))
    assert list(state) == ["0.0", "0.2", "1.0", "1.2"]
    load_memory_state_dict(second, state)
    for model in (first, second):
        model.zero_grad()
        model(own_batch(7)).square().mean().backward()
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(whole(one.grad), whole(other.grad))
    assert list(first.state_dict()) == list(blocks().state_dict())


def check_revert_gives_the_dense_model_back():
    for convert_first, by_layer in itertools.product((True, False), repeat=2):
        ours, dense = revert_(sharded(blocks(), convert_first, by_layer)), blocks()
        kinds = {type(layer).__name__ for layer in linears(ours)}
        assert kinds == {"FSDPLinear" if by_layer else "Linear"}
        x = own_batch(0)
        for model in (ours, dense):
            model(x).square().mean().backward()
        for mine, theirs in zip(ours.parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(whole(mine.grad), mean_over_processes(theirs.grad))
        # And once more: what was reverted can be converted.
        assert_trains_like_single_processes(converted(ours), converted(blocks()), steps=2)


def check_inputs_in_a_few_bits():
    for convert_first, by_layer in itertools.product((True, False), (True, False)):
        assert_rounds_only(sharded(blocks(), convert_first, by_layer, ROUNDED))


def check_saved_tensors_in_a_few_bits():
    for by_layer, reshard in itertools.product((True, False), repeat=2):
        model = wide_blocks()
        for module in linears(model) if by_layer else model:
            fully_shard(module, mesh=mesh(), reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh(), reshard_after_forward=reshard)
        assert_rounds_what_is_saved(model, model)
