"""Divided layers, their undivided originals, and what the shards of a layer agree on."""

import contextlib
import copy
import functools
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from memaop_triton.backward.shards import ProcessShards
from tests.distributed.checks import converted, seed, whole

ROWS = 20


@functools.cache
def mesh():
    return init_device_mesh("cpu", (2,))


def rank():
    return dist.get_rank()


def columns(a):
    """This process's part of the columns of a plain tensor."""
    return a.chunk(2, dim=-1)[rank()]


def plan(column=None, row=None):
    """Both ways to divide a layer, with keyword arguments of each."""
    return {"0": ColwiseParallel(**column or {}), "2": RowwiseParallel(**row or {})}


def parallel(model, config, layouts, convert_first):
    model = copy.deepcopy(model)
    if convert_first:
        return parallelize_module(converted(model, config), mesh(), layouts)
    return converted(parallelize_module(model, mesh(), layouts), config)


def assert_same_gradients(ours, reference, **tolerance):
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        assert mine.grad.placements == mine.placements
        assert mine.grad.dtype == mine.dtype
        torch.testing.assert_close(whole(mine.grad), theirs.grad, **tolerance)


def step(model, x, scale=1.0):
    model.zero_grad()
    y = model(x)
    y = y.to_local() if isinstance(y, DTensor) else y
    (y.square().sum() * scale).backward()
    return y


def linear(out_features=8, in_features=12):
    """A layer, the same one in every process, which from then on draws for itself."""
    torch.manual_seed(0)
    layer = nn.Linear(in_features, out_features, dtype=torch.float64)
    seed()
    return layer


def single(style, config, out_features=8, in_features=12, on=None):
    """A divided layer that takes and gives whole activations, and its undivided original."""
    plain = linear(out_features, in_features)
    whole_activations = style(input_layouts=Replicate(), output_layouts=Replicate())
    layer = parallelize_module(copy.deepcopy(plain), on or mesh(), whole_activations)
    return converted(layer, config), plain


def backward(layer, x, g):
    layer.zero_grad()
    layer(x).backward(g)


def placed(layer, on, placements):
    """`layer` with parameters that lie on a mesh where `placements(parameter)` says."""
    layer = copy.deepcopy(layer)
    for name, parameter in list(layer.named_parameters()):
        part = distribute_tensor(parameter.detach(), on, placements(parameter))
        layer.register_parameter(name, nn.Parameter(part))
    return layer


def times_drawn(selection, rows=ROWS):
    """Σ w over the draws of each row, [rows, 1]; what lies beyond the last counts for nothing."""
    indices, weights = selection
    inside = indices < rows
    total = torch.zeros(rows, 1, dtype=torch.float64)
    return total.index_add_(0, indices[inside], weights[inside][:, None])


@contextlib.contextmanager
def recording():
    """What the shards agree on inside."""
    agreed = SimpleNamespace(scores=[], selections=[])

    def recorded(name, results):
        original = getattr(ProcessShards, name)

        def method(shards, value):
            results.append(original(shards, value))
            return results[-1]

        return mock.patch.object(ProcessShards, name, method)

    scores = recorded("all_reduce_scores", agreed.scores)
    with scores, recorded("broadcast_selection", agreed.selections):
        yield agreed
