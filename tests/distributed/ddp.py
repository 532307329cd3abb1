"""Data-parallel models, each process with a batch of its own."""

import copy

import torch
from torch.nn.parallel import DistributedDataParallel

from memaop_triton import MemAOPConfig, MemAOPLinear, memory_state_dict, revert_
from tests.distributed import checks
from tests.distributed.checks import PAPER, converted
from tests.distributed.fsdp import (
    ROUNDED,
    assert_rounds_only,
    assert_rounds_what_is_saved,
    assert_trains_like_single_processes,
    blocks,
    linears,
    own_batch,
    wide_blocks,
)


def wrapped(config=PAPER, convert_first=True, **options):
    model = blocks()
    if convert_first:
        return DistributedDataParallel(converted(model, config), **options)
    return converted(DistributedDataParallel(model, **options), config)


def check_gradients_are_the_means_of_single_processes():
    for convert_first in (True, False):
        for options in ({}, {"static_graph": True}, {"gradient_as_bucket_view": True}):
            ours = wrapped(convert_first=convert_first, **options)
            assert_trains_like_single_processes(ours, converted(blocks()))


def check_memory_is_not_synchronised():
    """Neither when the model is wrapped nor by the broadcast of buffers before a forward pass."""
    model = blocks()
    model.register_buffer("counter", torch.zeros(1))
    converted(model)
    for step in range(2):
        model(own_batch(step)).square().mean().backward()
    before = copy.deepcopy(memory_state_dict(model))
    ours = DistributedDataParallel(model)
    ours(own_batch(2))
    for layer, state in zip(linears(ours), before.values(), strict=True):
        assert torch.equal(layer.memory.x, state["x"])
        assert not checks.same_everywhere(layer.memory.x)


def check_every_process_draws_for_itself():
    """Unlike shards of one layer: that the processes' rows differ is what the mean gains from."""
    ours = wrapped(MemAOPConfig(k=1, memory="none"))
    x = checks.batch(20, 12)
    with ours.no_sync():
        ours(x).square().mean().backward()
    assert not checks.same_everywhere(linears(ours)[0].weight.grad)


def check_reverts_inside_the_wrapper():
    ours = revert_(wrapped())
    assert not any(isinstance(layer, MemAOPLinear) for layer in linears(ours))
    assert_trains_like_single_processes(converted(ours), converted(blocks()), steps=1)


def check_inputs_in_a_few_bits():
    assert_rounds_only(wrapped(ROUNDED))


def check_saved_tensors_in_a_few_bits():
    for inside in (True, False):
        for options in ({}, {"static_graph": True}, {"gradient_as_bucket_view": True}):
            ours = DistributedDataParallel(wide_blocks(), **options)
            assert_rounds_what_is_saved(ours, ours.module if inside else ours)
