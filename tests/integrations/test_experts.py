"""Experts of transformers, which are Parameters of three dimensions."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memaop_triton import (
    MemAOPConfig,
    Subspace,
    convert_,
    coverage,
    memory_state_dict,
    model_report,
    monitor,
    plan,
    revert_,
)
from memaop_triton.nn import expert_ops
from memaop_triton.nn.experts import MemAOPExperts
from memaop_triton.nn.layer_choice import converted_layers
from tests import routed
from tests.auto.training import steps_of_a_second

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed, with which this is tested"
)
pytest.importorskip(
    "transformers.integrations.moe", reason="transformers has no registry of experts before 5.0"
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

EXACT = MemAOPConfig(ratio=1, memory=None)
HALF = MemAOPConfig(ratio=1 / 2, memory=None)
CLASSES = ("Mixtral", "Qwen3Moe", "GptOss", "NemotronH")
SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "Mixtral": {"intermediate_size": 96, "num_local_experts": 4},
    "Qwen3Moe": {
        "moe_intermediate_size": 48,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
    },
}
IDS = torch.arange(128).view(4, 32) % 97 + 3
BATCH = {"input_ids": IDS, "labels": IDS}


def language_model(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **MODELS[name])
    return getattr(transformers, f"{name}ForCausalLM")(config).train()


def step(module, seed=1, made=None, call=None):
    """Results, the gradient of the inputs, and those of Parameters by name."""
    torch.manual_seed(seed)
    module.zero_grad()
    x, ids, weights = routed.tokens() if made is None else made
    x, weights = (a.clone().requires_grad_() for a in (x, weights))
    y = module(x, ids, weights) if call is None else call(x, ids, weights)
    y.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    return y.detach(), {"x": x.grad, "weights": weights.grad, **gradients}


def assert_same(found, expected, **tolerance):
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, **tolerance)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_exact_gradients_are_those_of_transformers(name, implementation):
    dense = routed.experts(name, implementation)
    ours = convert_(copy.deepcopy(dense), EXACT)
    assert isinstance(ours, MemAOPExperts)
    assert type(ours).__name__ == f"MemAOP{name}Experts"
    is_same = implementation == "grouped_mm"
    tolerance = {"rtol": 0, "atol": 0} if is_same else {"rtol": 1e-4, "atol": 1e-5}
    assert_same(step(ours), step(dense), **tolerance)
    # In evaluation mode it is the function that the model's configuration names.
    assert_same(step(ours.eval()), step(dense.eval()), rtol=0, atol=0)


@pytest.mark.parametrize("name", CLASSES)
def test_gradients_are_right_in_the_mean_and_others_exact(name, mean_agrees):
    # The function `grouped_mm` takes no float64.
    dense = routed.experts(name, "batched_mm", torch.float64)
    made = routed.tokens(dtype=torch.float64)
    ours = convert_(copy.deepcopy(dense), MemAOPConfig(ratio=1 / 4, memory=None))
    y, expected = step(dense, made=made)
    draws = [step(ours, seed, made) for seed in range(200)]
    torch.testing.assert_close(draws[0][0], y)
    for parameter, exact in expected.items():
        of_one = [gradients[parameter] for _, gradients in draws]
        if parameter in ("gate_up_proj", "up_proj", "down_proj"):
            for expert in range(routed.EXPERTS):
                mean_agrees([one[expert] for one in of_one], exact[expert])
            assert not torch.equal(of_one[0], of_one[1])
        else:
            torch.testing.assert_close(of_one[0], exact)


def test_rows_are_a_share_of_all_that_are_routed(monkeypatch):
    taken = []
    original = expert_ops.experts_weight_grad

    def recorded(x, g, ends, config, **options):
        taken.append((tuple(x.shape), tuple(g.shape), config.num_rows(len(x), 1, 1), config.memory))
        return original(x, g, ends, config, **options)

    monkeypatch.setattr(expert_ops, "experts_weight_grad", recorded)
    # A subspace would be one for each expert, and there is none.
    module = convert_(routed.experts(), MemAOPConfig(ratio=1 / 4, memory=Subspace(rank=2)))
    assert not memory_state_dict(module)
    step(module)
    rows = routed.TOKENS * routed.TOP_K
    assert taken == [
        ((rows, 24), (rows, routed.WIDTH), rows // 4, None),
        ((rows, routed.WIDTH), (rows, 48), rows // 4, None),
    ]


def test_layers_and_names():
    module = convert_(nn.ModuleDict({"a": routed.experts(), "b": routed.experts("GptOss")}), HALF)
    sizes = {
        name: (layer.in_features, layer.out_features) for name, layer in converted_layers(module)
    }
    both = {"gate_up": (routed.WIDTH, 48), "down": (24, routed.WIDTH)}
    assert sizes == {f"{one}.{name}": found for one in "ab" for name, found in both.items()}
    assert dict(converted_layers(convert_(routed.experts("NemotronH"), HALF))).keys() == {
        "up",
        "down",
    }
    assert module["b"].gate_up.weight is module["b"].gate_up_proj
    shapes = [module[one].gate_up.gradient_shape for one in "ab"]
    assert shapes == [(routed.EXPERTS * 48, routed.WIDTH), (routed.EXPERTS * routed.WIDTH, 48)]
    before = routed.experts()
    assert list(module["a"].state_dict()) == list(before.state_dict())
    revert_(module)
    assert type(module["a"]) is type(before)
    assert vars(module["a"]).keys() == vars(before).keys()
    assert not module["a"]._modules.keys() - before._modules.keys()
    convert_(module, HALF, overrides={"*.gate_up": None})
    assert {name for name, _ in converted_layers(module)} == {"a.down", "b.down"}
    found, expected = (step(m)[1]["gate_up_proj"] for m in (module["a"], before))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_covered(name):
    model = language_model(name)
    left = coverage(model, BATCH).left
    assert left[f"{name}Experts"].is_convertible
    found = plan(model, HALF, example_inputs=BATCH, time_budget=0.01)
    (layer,) = [one for one in found.layers if one.name == "model.layers.1.mlp.experts.down"]
    assert layer.rows == (2 * IDS.numel(),)
    assert "MemAOP" not in repr(model)
    convert_(model, HALF)
    for covered in (coverage(model), coverage(model, BATCH)):
        assert covered.share >= 0.95
        assert set(covered.left) == {f"{name}TopKRouter"}
        assert not covered.is_estimate


def test_training_lowers_the_loss():
    model = convert_(language_model("Mixtral"), MemAOPConfig(ratio=1 / 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for _ in range(6):
        loss = model(**BATCH).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_by_default_the_library_decides(monkeypatch):
    steps_of_a_second(monkeypatch)  # the fifth one is observed
    dense = language_model("Mixtral")
    model = convert_(copy.deepcopy(dense))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, dense)]
    for number in range(6):
        results = []
        for one, optimizer in zip((model, dense), optimizers, strict=True):
            output = one(**BATCH)
            output.loss.backward()
            results.append(output.logits)
            optimizer.step()
            optimizer.zero_grad()
        assert number > 4 or torch.equal(*results)
    lines = model_report(model).splitlines()
    (line,) = [one for one in lines if one.startswith("model.layers.0.mlp.experts.gate_up")]
    assert line.split()[1:3] == [str(2 * IDS.numel()), "exact"]
    assert float(line.split()[3]) > 0
    assert lines[-1].startswith("Converted layers compute about 100 %")


def test_a_monitor_sees_the_routed_rows():
    module = convert_(routed.experts("GptOss"), HALF)
    with monitor(module, every=1) as watching:
        step(module)
    rows = routed.TOKENS * routed.TOP_K
    read = watching.read()
    assert {n: (d.k, d.rows) for n, d in read.items()} == {
        "gate_up": (rows // 2, rows),
        "down": (rows // 2, rows),
    }
    exact = convert_(routed.experts("GptOss"), EXACT)
    with monitor(exact, every=1) as watching:
        _, gradients = step(exact)
    square = gradients["down_proj"].square().sum().item()
    assert watching.read()["down"].gradient_square == pytest.approx(square, rel=1e-4)
    # Of a sample it is an estimate.
    assert read["down"].gradient_square == pytest.approx(square, rel=0.5)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies(way):
    module = convert_(routed.experts(), HALF)
    twin = copy.deepcopy(module) if way == "deepcopy" else pickle.loads(pickle.dumps(module))
    assert type(twin) is type(module)
    assert twin.down.weight is twin.down_proj
    assert twin.down.weight is not module.down_proj
    for seed in range(2):
        assert_same(step(twin, seed), step(module, seed), rtol=0, atol=0)
    assert type(revert_(twin)).__name__ == "MixtralExperts"


def test_checkpoints_load_either_way(tmp_path):
    model = convert_(language_model("Mixtral"), HALF)
    model.save_pretrained(tmp_path)
    loaded = transformers.MixtralForCausalLM.from_pretrained(tmp_path)
    assert "MemAOP" not in repr(loaded)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)


def test_checkpointing_changes_nothing():
    module = convert_(routed.experts(), HALF)
    again = step(module, call=lambda *made: checkpoint(module, *made, use_reentrant=False))
    assert_same(again, step(module), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, "autocast"])
def test_dtypes_are_those_of_transformers(dtype):
    if dtype == "autocast":
        dense, made = routed.experts(), routed.tokens(dtype=torch.bfloat16)
    else:
        dense, made = routed.experts("Mixtral", "eager", dtype), routed.tokens(dtype=dtype)
    ours = convert_(copy.deepcopy(dense), EXACT)
    found = []
    for module in (ours, dense):

        def call(*inputs, module=module):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
                return module(*inputs)

        found.append(step(module, made=made, call=call))
    assert found[0][0].dtype == found[1][0].dtype
    assert_same(*found, rtol=0.02, atol=0.05)


def test_sizes_that_the_grouped_product_does_not_take():
    dense = routed.experts("Mixtral", "eager", intermediate_size=25)
    ours = convert_(copy.deepcopy(dense), EXACT)
    assert_same(step(ours), step(dense), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled():
    torch._dynamo.reset()
    module = convert_(routed.experts(), HALF)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        expected = step(module, seed)
        assert_same(step(module, seed, call=compiled), expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_frozen_weights_and_inputs():
    module = convert_(routed.experts(), HALF)
    module.gate_up_proj.requires_grad_(False)
    x, ids, weights = routed.tokens()
    module(x, ids, weights).sum().backward()
    assert module.gate_up_proj.grad is None
    assert module.down_proj.grad.any()
    module.requires_grad_(False)
    x.requires_grad_()
    module(x, ids, weights).sum().backward()
    assert x.grad.any()
    with torch.no_grad():
        assert not module(x, ids, weights).requires_grad


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        (MemAOPConfig(ratio=1 / 2, stash="int8"), "stash='int8'"),
        (MemAOPConfig(ratio=1 / 2, grad_input="sampled", memory=None), "grad_input='sampled'"),
        (MemAOPConfig(ratio=1 / 2, scores="grad", memory=None), "scores='grad'"),
        (MemAOPConfig.paper(ratio=1 / 2), "memory='residual'"),
    ],
)
def test_what_is_only_for_linear_layers(config, setting):
    model = nn.ModuleDict({"linear": nn.Linear(64, 64), "experts": routed.experts()})
    with pytest.warns(
        UserWarning, match=f"because {setting} is not for experts: 'experts.gate_up'"
    ):
        convert_(model, config)
    assert {name for name, _ in converted_layers(model)} == {"linear"}
    assert type(model["experts"]).__name__ == "MixtralExperts"
    revert_(model)
    with pytest.raises(ValueError, match=f"'experts.down': {setting} is for linear layers"):
        convert_(model, HALF, overrides={"experts.down": config})
    assert type(model["experts"]).__name__ == "MixtralExperts"


def test_derivatives_that_are_refused():
    module = convert_(routed.experts(), HALF)
    x, ids, weights = routed.tokens()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(module(x, ids, weights).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        gradient.sum().backward()
    y = module(x, ids, weights)
    with pytest.raises(RuntimeError, match="cannot be batched"):
        torch.autograd.grad(y, x, torch.ones(3, *y.shape), is_grads_batched=True)


def test_experts_of_others_stay_and_are_named():
    class Experts(nn.Module):
        """The same Parameters, multiplied by a function of its own."""

        def __init__(self):
            super().__init__()
            self.up_proj = nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, x):
            return x @ self.up_proj[0]

    kind = type(routed.experts())

    class Own(kind):
        def forward(self, *inputs):
            return super().forward(*inputs)

    own = routed.experts()
    own.__class__ = Own
    model = nn.ModuleDict({"others": Experts(), "own": own, "linear": nn.Linear(99, 99)})
    model["parallel"] = routed.experts()
    model["parallel"]._is_expert_parallel = True
    convert_(model, HALF)
    names = {name for name, _ in converted_layers(model)}
    assert names == {"linear", "parallel.gate_up", "parallel.down"}
    left = coverage(model).left
    assert set(left) == {"Experts", "Own"}
    assert all(one.reason == "Parameters of 3 dimensions" for one in left.values())
    # Expert parallelism is left to transformers.
    assert_same(step(model["parallel"]), step(routed.experts()), rtol=0, atol=0)


def test_quantised_weights_stay():
    module = routed.experts()
    module.down_proj = nn.Parameter(module.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="no layer to convert"):
        convert_(module, HALF)


def test_biases_are_no_products():
    model = convert_(nn.Sequential(routed.experts("GptOss")), HALF)
    left = coverage(model).left
    assert left["GptOssExperts"].reason == "biases"
    assert left["GptOssExperts"].share < 0.1
