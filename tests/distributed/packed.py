"""Modules that are taken apart into layers, in two processes: DDP by factors, FSDP2."""

import copy
import itertools

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from memaop_triton import MemAOPConfig, convert_, coverage, memory_state_dict, revert_
from memaop_triton.auto.agreement import divided_among
from memaop_triton.nn.attention import MemAOPMultiheadAttention
from memaop_triton.nn.layer_choice import converted_layers
from memaop_triton.nn.packed import Host
from tests import routed
from tests.distributed.checks import case, everywhere, whole
from tests.distributed.comm_hook import N, Pair
from tests.distributed.tensor_parallel_cases import rank

HALF = MemAOPConfig(ratio=1 / 2, memory=None)


class Attending(nn.Module):
    """Rows that attend to each other, and to others of themselves."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.alike, self.crossed = (nn.MultiheadAttention(N, 4) for _ in range(2))

    def forward(self, x):
        y = self.alike(x, x, x, need_weights=False)[0]
        return self.crossed(y, x, x, need_weights=False)[0]


def check_factors_of_a_packed_weight_are_gathered_where_it_is_one_layer():
    for settings in ({"memory": "none"}, {}):
        pair = Pair(Attending, settings)
        assert isinstance(pair.ours.module.alike, MemAOPMultiheadAttention)
        # The parts of the other weight are not exchanged as factors.
        pair.train(("alike.in_proj_weight", "alike.out_proj.weight", "crossed.out_proj.weight"))


def gradients_of(model, call):
    torch.manual_seed(rank())
    model.zero_grad()
    call(model).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def check_a_fully_sharded_model_computes_what_it_does_alone():
    torch.manual_seed(3)
    models = {"attention": nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0)}
    if routed.has_transformers():
        models["experts"] = nn.ModuleList([routed.experts()])
    torch.manual_seed(10 + rank())
    x, memory = torch.randn(6, 3, 16), torch.randn(5, 3, 16)
    made = routed.tokens(seed=rank())
    calls = {
        "attention": lambda model: model(x, memory),
        "experts": lambda model: model[0](*made),
    }
    for (name, model), convert_first in itertools.product(models.items(), (True, False)):
        with case((name, convert_first)):
            ours, call = copy.deepcopy(model), calls[name]
            inner = ours.self_attn if name == "attention" else ours[0]
            if convert_first:
                convert_(ours, HALF)
            fully_shard(inner)
            if name == "attention":
                fully_shard(ours)
            if not convert_first:
                convert_(ours, HALF)
            assert isinstance(inner, Host)
            assert coverage(ours).share == 1
            expected = gradients_of(convert_(copy.deepcopy(model), HALF), call)
            for key, gradient in gradients_of(ours, call).items():
                torch.testing.assert_close(whole(gradient), everywhere(expected[key]).mean(0))
            revert_(ours)
            assert not isinstance(inner, Host)


def check_memories_of_gathered_projections_are_of_whole_weights():
    """They are read between two steps, and are those of a copy that nobody shards."""
    torch.manual_seed(3)
    dense = nn.MultiheadAttention(16, 4)
    torch.manual_seed(10 + rank())
    x = torch.randn(6, 3, 16)
    sharded = convert_(fully_shard(copy.deepcopy(dense)), MemAOPConfig(ratio=1 / 2))
    alone = convert_(copy.deepcopy(dense), MemAOPConfig(ratio=1 / 2))

    def call(model):
        return model(x, x, x, need_weights=False)[0]

    for step in range(2):
        expected, found = gradients_of(alone, call), gradients_of(sharded, call)
        for name, gradient in found.items():
            with case((name, step)):
                torch.testing.assert_close(whole(gradient), everywhere(expected[name]).mean(0))
        memories = memory_state_dict(sharded)
        assert {"in_proj", "out_proj"} <= memories.keys()
        for name, state in memory_state_dict(alone).items():
            with case((name, step)):
                assert memories[name].keys() == state.keys()
                for key in [key for key, value in state.items() if isinstance(value, torch.Tensor)]:
                    torch.testing.assert_close(memories[name][key], state[key])


def check_gathered_projections_are_not_divided():
    models = {"attention": nn.Sequential(nn.MultiheadAttention(16, 4))}
    if routed.has_transformers():
        # The weights of these are transposed.
        models["experts"] = nn.Sequential(routed.experts("GptOss"))
    for name, model in models.items():
        with case(name):
            fully_shard(model)
            convert_(model)
            layers = dict(converted_layers(model))
            assert len(layers) >= 2
            assert all(divided_among(layer) == 1 for layer in layers.values())
            # PyTorch's compiler asks for this beside the other mark.
            assert all(layer._fsdp_use_orig_params for layer in layers.values())
            assert "ratio=auto" in repr(model)


def check_divided_experts_have_no_memory_to_look_at():
    if not routed.has_transformers():
        return
    model = convert_(nn.Sequential(routed.experts("GptOss")), HALF)
    mesh = init_device_mesh("cpu", (2,))
    for name, weight in list(model[0].named_parameters(recurse=False)):
        setattr(model[0], name, nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)])))
    assert all(layer.memory is None for _, layer in converted_layers(model))
    assert "memory=none" in repr(model)


def check_a_last_layer_that_is_sharded_by_itself_is_converted():
    torch.manual_seed(3)
    dense = nn.MultiheadAttention(16, 4)
    torch.manual_seed(10 + rank())
    x = torch.randn(6, 3, 16)
    ours = copy.deepcopy(dense)
    fully_shard(ours.out_proj)
    fully_shard(ours)
    convert_(ours, HALF)
    assert "out_proj" in dict(converted_layers(ours))

    def call(model):
        return model(x, x, x, need_weights=False)[0]

    expected = gradients_of(convert_(dense, HALF), call)
    for name, gradient in gradients_of(ours, call).items():
        torch.testing.assert_close(whole(gradient), everywhere(expected[name]).mean(0))
