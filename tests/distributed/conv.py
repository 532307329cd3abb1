"""Convolutions of data-parallel and fully sharded models, each process with a batch of its own."""

import copy
import itertools

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from memaop_triton import (
    FactorAllGather,
    MemAOPConfig,
    MemAOPConv2d,
    load_memory_state_dict,
    memory_state_dict,
    revert_,
)
from tests.distributed import checks
from tests.distributed.checks import batch, case, converted, whole
from tests.distributed.fsdp import mean_over_processes, mesh

LARGEST = MemAOPConfig(ratio=1 / 4, selection="topk", memory=None)


def network(dtype=torch.float64):
    """A block of convolutions and one of a linear layer, the same in every process."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.Tanh()
    second = nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.Tanh(), nn.Conv2d(8, 4, 1)
    model = nn.Sequential(
        nn.Sequential(*first, *second), nn.Sequential(nn.Flatten(), nn.Linear(36, 48))
    )
    checks.seed()
    return model.to(dtype)


def images(step, dtype=torch.float64):
    return batch(6, 3, 8, 8, step=100 * dist.get_rank() + step, dtype=dtype)


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def sharded(model, convert_first=True, by_layer=False, config=LARGEST, **options):
    model = copy.deepcopy(model)
    if convert_first:
        converted(model, config)
    for module in convolutions(model) if by_layer else model:
        fully_shard(module, mesh=mesh(), **options)
    fully_shard(model, mesh=mesh(), **options)
    return model if convert_first else converted(model, config)


def backward(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad for p in model.parameters()]


def assert_means(found, alone):
    for mine, theirs in zip(found, alone, strict=True):
        torch.testing.assert_close(whole(mine), mean_over_processes(theirs))


def check_gradients_are_the_means_of_single_processes():
    alone = converted(network(), LARGEST)
    for convert_first, by_layer in itertools.product((True, False), repeat=2):
        with case(f"{convert_first=} {by_layer=}"):
            ours = sharded(network(), convert_first, by_layer)
            assert all(isinstance(layer, MemAOPConv2d) for layer in convolutions(ours))
            for step in range(2):
                assert_means(backward(ours, images(step)), backward(alone, images(step)))
            assert_means(backward(revert_(ours), images(2)), backward(network(), images(2)))
    for options in ({}, {"static_graph": True}, {"gradient_as_bucket_view": True}):
        ours = DistributedDataParallel(converted(network(), LARGEST), **options)
        for step in range(3):
            assert_means(backward(ours, images(step)), backward(alone, images(step)))


def check_mixed_precision_computes_in_the_parameters_dtype():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ours = sharded(network(torch.float32), mp_policy=policy)
    alone = converted(network(torch.float32).bfloat16(), LARGEST)
    x = images(0, torch.float32)
    found = backward(ours, x)
    assert {grad.dtype for grad in found} == {torch.float32}
    assert_means(found, [grad.float() for grad in backward(alone, x.bfloat16())])


def check_memories_are_saved_and_continue():
    config = MemAOPConfig(ratio=1 / 4, selection="topk", memory="subspace")
    first, second = (sharded(network(), by_layer=by, config=config) for by in (False, True))
    for step in range(3):
        backward(first, images(step))
    load_memory_state_dict(second, copy.deepcopy(memory_state_dict(first)))
    both = [backward(model, images(7)) for model in (first, second)]
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(whole(mine), whole(theirs))


def check_factors_are_exchanged_of_linear_layers_only():
    config = MemAOPConfig(k=1, selection="topk", memory=None)
    plain = DistributedDataParallel(converted(network(), config))
    ours = DistributedDataParallel(converted(network(), config))
    hook = FactorAllGather.register(ours)
    for step in range(2):
        both = [backward(model, images(step)) for model in (ours, plain)]
        for mine, theirs in zip(*both, strict=True):
            torch.testing.assert_close(mine, theirs)
    world, linear = dist.get_world_size(), ours.module[1][1].weight
    assert hook.bytes_replaced == 2 * (2 * (world - 1) * linear.nbytes // world)
    assert hook.bytes_sent < hook.bytes_replaced
