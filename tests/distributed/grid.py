"""Four processes, two by two: both ways to divide a model, together."""

import functools

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from memaop_triton import MemAOPConfig, model_report
from tests.distributed.checks import (
    PAPER,
    batch,
    converted,
    everywhere,
    mlp,
    same_everywhere,
    whole,
)
from tests.distributed.tensor_parallel_cases import ROWS, linear, placed, plan, recording, step


@functools.cache
def mesh():
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def part_of_batch(number):
    """A batch for each pair of processes that share the layers."""
    return batch(ROWS, 12, step=100 * mesh().get_local_rank("dp") + number)


def check_each_group_shares_its_own_selection():
    config = MemAOPConfig(k=6, memory="none")
    model = converted(parallelize_module(mlp(), mesh()["tp"], plan()), config)
    with recording() as agreed:
        step(model, part_of_batch(0))
    assert len(agreed.selections) == 2
    for indices, weights in agreed.selections:
        assert same_everywhere(indices, mesh().get_group("tp"))
        assert same_everywhere(weights, mesh().get_group("tp"))
        assert not same_everywhere(indices, mesh().get_group("dp"))


def check_fully_sharded_over_the_groups():
    """The mean over the two batches, of layers that are divided within each pair."""
    for reshard in (True, False):
        model = converted(parallelize_module(mlp(), mesh()["tp"], plan()))
        for module in (model[0], model[2], model):
            fully_shard(module, mesh=mesh()["dp"], reshard_after_forward=reshard)
        reference = converted(mlp())
        for number in range(3):
            step(model, part_of_batch(number))
            step(reference, part_of_batch(number))
            for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
                torch.testing.assert_close(whole(mine.grad), everywhere(theirs.grad).mean(0))
        assert model[0].memory.out_features == 4
        assert model[2].memory.in_features == 4


def check_auto_leaves_layers_exact_that_are_divided_and_fully_sharded():
    """That they are divided shows once they were observed; from then on they are native."""
    model = nn.Sequential(*mlp(), nn.Tanh(), nn.Linear(6, 4, dtype=torch.float64))
    auto = MemAOPConfig(ratio="auto", memory="none")
    converted(parallelize_module(model, mesh()["tp"], plan()), auto)
    for module in (model[0], model[2], model[4], model):
        fully_shard(module, mesh=mesh()["dp"])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    native = []
    for number in range(14):
        native.append([model[i].layer_state.is_native for i in (0, 2, 4)])
        step(model, part_of_batch(number))
        optimizer.step()
    assert native == [[n != 4, n != 4, n not in (4, 8, 12)] for n in range(14)]
    seen = model[0].layer_state.controller.seen
    assert [len(found) for found in seen.values()] == [0, 0, 3]
    assert everywhere(torch.tensor([s.square for s in seen["4"]])).unique(dim=0).shape[0] == 1
    first, second, other, _ = model_report(model).splitlines()[2:]
    assert all(line.endswith("divided by tensor parallelism") for line in (first, second))
    assert "divided" not in other


def check_weights_placed_on_both_dimensions():
    """Replicated over one dimension of the mesh, where the rows are divided, as DTensors do it."""
    for divided in (0, 1):
        for number in range(2):
            dense = linear()

            def across(parameter, dim=divided):
                return [Replicate(), Shard(dim) if parameter.dim() > dim else Replicate()]

            layer = placed(dense, mesh(), across)
            config = PAPER if number == 0 else MemAOPConfig(k=ROWS, memory="none")
            converted(layer, config)
            x, g = batch(ROWS, 12).requires_grad_(), batch(ROWS, 8)
            rows = distribute_tensor(x.detach(), mesh(), [Shard(0), Replicate()])
            rows.requires_grad_()
            y = layer(rows)
            dense(x).backward(g)
            torch.testing.assert_close(whole(y), dense(x))
            y.backward(distribute_tensor(g, mesh(), [Shard(0), Replicate()]))
            torch.testing.assert_close(whole(rows.grad), x.grad)
            torch.testing.assert_close(whole(layer.bias.grad), g.sum(0))
            assert layer.weight.grad.placements == layer.weight.placements
            expected = dense.weight.grad
            if number == 0:
                # The four largest rows of each half.
                expected = torch.zeros_like(expected)
                for part, outer in zip(x.detach().chunk(2), g.chunk(2), strict=True):
                    best = (part.norm(dim=1) * outer.norm(dim=1)).topk(4).indices
                    expected += outer[best].T @ part[best]
            torch.testing.assert_close(whole(layer.weight.grad), expected)
