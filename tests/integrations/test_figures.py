"""What the integrations log about modules that are taken apart into layers."""

import pytest
import torch
from torch import nn

from memaop_triton import MemAOPConfig, convert_
from memaop_triton.integrations.conversion import figures
from tests import routed

HALF, EXACT = MemAOPConfig(ratio=1 / 2, memory=None), MemAOPConfig(ratio=1, memory=None)
WIDTH, HIDDEN = 16, 40
LINEAR = WIDTH * HIDDEN


def sampled_share(model, config, **arguments):
    return figures(convert_(model, config, **arguments)).get("memaop/sampled_share")


def encoder():
    layer = nn.TransformerEncoderLayer(WIDTH, 4, HIDDEN, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def test_projections_of_an_encoder_count():
    assert sampled_share(encoder(), HALF) == 1
    assert sampled_share(encoder(), EXACT) == 0
    every = 2 * (4 * WIDTH**2 + 2 * LINEAR)
    found = sampled_share(encoder(), EXACT, overrides={"*.in_proj": HALF})
    assert found == 2 * 3 * WIDTH**2 / every
    found = sampled_share(encoder(), HALF, overrides={"*.in_proj": EXACT, "*.linear1": None})
    assert found == (2 * WIDTH**2 + 2 * LINEAR) / (every - 2 * LINEAR)


def test_a_weight_that_is_part_of_several_layers_counts_once():
    """An attention that may be called in two ways has a layer for each."""

    def share(**overrides):
        model = nn.ModuleDict({"a": nn.MultiheadAttention(WIDTH, 4), "b": nn.Linear(WIDTH, WIDTH)})
        named = {name.replace("__", "."): config for name, config in overrides.items()}
        return sampled_share(model, EXACT, overrides=named)

    assert share(a__in_proj=HALF) == 3 / 5
    assert share(a__q_proj=HALF) == 1 / 5
    assert share(a__in_proj=HALF, a__q_proj=HALF, a__k_proj=HALF) == 3 / 5
    assert share(b=HALF) == 1 / 5
    assert share(a__in_proj=None, a__v_proj=None, b=HALF) == 1 / 4
    tied = nn.ModuleList(
        [nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)]
    )
    tied[1].weight = tied[0].weight
    assert sampled_share(tied, EXACT, overrides={"2": HALF}) == 1 / 2


def test_frozen_weights_do_not_count():
    model = encoder()
    for layer in model.layers:
        layer.self_attn.in_proj_weight.requires_grad_(False)
    found = sampled_share(model, HALF, overrides={"*.linear2": EXACT})
    assert found == (WIDTH**2 + LINEAR) / (WIDTH**2 + 2 * LINEAR)
    assert sampled_share(encoder().requires_grad_(False), HALF) is None


@pytest.mark.skipif(not routed.has_transformers(), reason="transformers is not installed")
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_projections_of_experts_count(name):
    experts = routed.experts(name)
    into, down = experts.gate_up_proj.numel(), experts.down_proj.numel()
    model = nn.ModuleDict({"experts": experts, "head": nn.Linear(WIDTH, WIDTH)})
    found = sampled_share(model, HALF, overrides={"experts.down": EXACT})
    assert found == (into + WIDTH**2) / (into + down + WIDTH**2)


def test_weights_of_another_step_are_told_apart():
    module = pytest.importorskip("memaop_triton.integrations.transformers")
    model = convert_(nn.MultiheadAttention(WIDTH, 4), HALF, overrides={"out_proj": None})
    before = module._digest(model)
    assert before == module._digest(model)
    with torch.no_grad():
        model.in_proj_weight[0, 0] += 1
    assert before != module._digest(model) != ""


def test_the_first_weights_of_which_a_process_has_a_part_tell():
    module = pytest.importorskip("memaop_triton.integrations.transformers")

    class Empty(nn.Parameter):
        """As a divided weight, in a process that has no row of it."""

        def to_local(self):
            return self.detach()[:0]

    model = convert_(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), HALF)
    model[0].weight = Empty(model[0].weight.detach())
    model[1].weight.requires_grad_(False)
    before = module._digest(model)
    with torch.no_grad():
        model[0].weight += 1
        model[1].weight += 1
    assert before == module._digest(model)
    with torch.no_grad():
        model[2].weight += 1
    assert before != module._digest(model)
