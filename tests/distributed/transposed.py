"""Layers that store their weight as [in, out] in two processes: DDP by factors, FSDP2, DTensors."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from memaop_triton import MemAOPConfig, convert_, coverage, revert_
from memaop_triton.nn.conv1d import MemAOPConv1D
from tests import transposed
from tests.distributed.checks import batch, everywhere, seed, whole
from tests.distributed.comm_hook import N, Pair
from tests.distributed.tensor_parallel_cases import placed, rank
from tests.transposed import Conv1D, twin_of

transposed.register()


def conv(nf, nx, dtype=torch.float64):
    torch.manual_seed(0)
    layer = Conv1D(nf, nx).to(dtype)
    seed()
    return layer


def check_factors_of_the_gradient_as_it_is_stored_are_gathered():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(Conv1D(256, N), nn.Tanh(), Conv1D(N, 256), nn.Tanh(), nn.Linear(N, 3))

    for settings in ({"memory": "none"}, {"side": "grad"}, {"side": "input"}):
        pair = Pair(build, settings)
        assert isinstance(pair.ours.module[0], MemAOPConv1D)
        pair.train()


def check_a_fully_sharded_layer_computes_what_it_does_alone():
    model, x = nn.Sequential(conv(8, 12), nn.Tanh(), conv(6, 8)), batch(20, 12, step=rank())
    exact = MemAOPConfig(ratio=1, memory="none", stash="int8")
    for convert_first in (True, False):
        ours = copy.deepcopy(model)
        if convert_first:
            convert_(ours, exact)
        fully_shard(ours[0])
        fully_shard(ours)
        if not convert_first:
            convert_(ours, exact)
        assert isinstance(ours[0], MemAOPConv1D)
        assert coverage(ours).share == 1, "sizes are those of the whole weights"
        with pytest.raises(ValueError, match=r"'0\.weight' is a DTensor, divided among processes"):
            coverage(ours, x)
        ours(x).square().sum().backward()
        model.zero_grad()
        model(x).square().sum().backward()
        for mine, theirs in zip(ours.parameters(), model.parameters(), strict=True):
            expected = everywhere(theirs.grad).mean(0)
            error = (whole(mine.grad) - expected).norm() / expected.norm()
            assert error < 2e-2, error
        revert_(ours)
        assert not isinstance(ours[0], MemAOPConv1D)
        assert isinstance(ours[0], Conv1D)


def check_a_divided_weight_gets_the_gradient_of_an_undivided_one():
    mesh, plain, x = init_device_mesh("cpu", (2,)), conv(8, 12), batch(20, 12)
    config = MemAOPConfig.paper(k=4)
    reference = convert_(twin_of(plain).double(), config)
    for dimension in (0, 1, None):

        def placements(parameter, dimension=dimension):
            if dimension is None:
                return [Replicate()]
            of_bias = Shard(0) if dimension == 1 else Replicate()
            return [of_bias if parameter.dim() == 1 else Shard(dimension)]

        layer = convert_(placed(plain, mesh, placements), config)
        sizes = {0: (6, 8), 1: (12, 4), None: (12, 8)}[dimension]
        assert (layer.memory.in_features, layer.memory.out_features) == sizes
        reference.memory.reset()
        for number in range(3):
            x = batch(20, 12, step=number)
            for one in (layer, reference):
                one.zero_grad()
            y = layer(DTensor.from_local(x, mesh, [Replicate()])).full_tensor()
            y.square().sum().backward()
            reference(x).square().sum().backward()
            assert layer.weight.grad.placements == layer.weight.placements
            torch.testing.assert_close(whole(layer.weight.grad), reference.weight.grad.t())
            torch.testing.assert_close(whole(layer.bias.grad), reference.bias.grad)
