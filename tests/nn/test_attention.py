"""`nn.MultiheadAttention`, whose projections are layers once it is converted."""

import copy
import itertools

import pytest
import torch
from torch import nn

from memaop_triton import (
    MemAOPConfig,
    convert_,
    coverage,
    load_memory_state_dict,
    memory_state_dict,
    model_report,
    monitor,
    plan,
    revert_,
)
from memaop_triton.nn.attention import MemAOPMultiheadAttention
from memaop_triton.nn.layer_choice import converted_layers
from memaop_triton.nn.packed import expose_
from tests.attending import (
    BATCH,
    EXACT,
    HALF,
    HEADS,
    LENGTH,
    NO_MEMORY,
    SEPARATE,
    WIDTH,
    assert_same,
    attention,
    inputs,
    layer_names,
    masked,
    name_of,
    step,
    transformer,
)
from tests.auto.training import steps_of_a_second

MASKS = ("nothing", "padding", "later", "causal", "causal and padding", "each head", "both")
SETTINGS = [
    {},
    {"batch_first": True, "bias": False},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"add_zero_attn": True, "batch_first": True, "dropout": 0.3},
    {"add_bias_kv": True, "bias": False},
    {"dropout": 0.3},
    SEPARATE,
    SEPARATE | {"bias": False, "add_bias_kv": True, "batch_first": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
@pytest.mark.parametrize(
    ("weights", "is_batched"),
    [("by head", True), ("none", True), ("averaged", False)],
    ids=["by head", "no weights", "unbatched"],
)
def test_results_and_exact_gradients_are_those_of_pytorch(settings, weights, is_batched):
    dense = attention(**settings)
    ours = convert_(copy.deepcopy(dense), EXACT)
    options = {
        "need_weights": weights != "none",
        "average_attn_weights": weights == "averaged",
    }
    cases = list(itertools.product(["values"] if "kdim" in settings else ["self", "values"], MASKS))
    if "kdim" not in settings:
        cases.append(("keys are values", "padding"))
    for way, mask in cases:
        made = inputs(way, settings, is_batched=is_batched, is_causal="causal" in mask)
        keys = made[1].shape[-2 if settings.get("batch_first") or not is_batched else 0]
        keywords = options | masked(mask, length=keys, is_batched=is_batched)

        def call(model, made=made, keywords=keywords):
            return model(*made, **keywords)

        assert_same(step(call, ours), step(call, dense), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("way", ["self", "values"])
def test_inputs_get_the_gradient_of_pytorch(need_weights, way):
    dense = attention()
    ours = convert_(copy.deepcopy(dense), NO_MEMORY)
    made = inputs(way, {})
    found = []
    for model in (dense, ours):
        # One tensor stays one.
        of_id = {id(a): a.clone().requires_grad_() for a in made}
        y, _ = model(*(of_id[id(a)] for a in made), need_weights=need_weights)
        y.square().sum().backward()
        found.append([a.grad for a in of_id.values()])
    for theirs, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_evaluation_and_native_steps_are_those_of_pytorch_bit_for_bit():
    dense = attention(torch.float32, batch_first=True)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    for config, training in ((HALF, False), (MemAOPConfig(ratio="auto"), True)):
        ours = convert_(copy.deepcopy(dense), config).train(training)
        found, expected = (step(lambda m: m(x, x, x), m.train(training)) for m in (ours, dense))
        assert_same(found, expected, rtol=0, atol=0)
    with torch.no_grad():  # PyTorch's fast path
        for y, z in zip(ours.eval()(x, x, x), dense.eval()(x, x, x), strict=True):
            assert torch.equal(y, z)


@pytest.mark.parametrize("config", [NO_MEMORY, HALF], ids=["none", "subspace"])
@pytest.mark.parametrize("way", ["self", "values"])
def test_gradients_are_right_in_the_mean(config, way, mean_agrees):
    dense = attention()
    made = inputs(way, {})
    _, expected = step(lambda m: m(*made)[0], dense)
    draws = {name: [] for name in expected}
    ours = convert_(copy.deepcopy(dense), config)
    step(lambda m: m(*(a + torch.randn_like(a) if way != "self" else a for a in made))[0], ours)
    for seed in range(150):
        _, gradients = step(lambda m: m(*made)[0], copy.deepcopy(ours), seed)
        for name, gradient in gradients.items():
            draws[name].append(gradient)
    for name, of_one in draws.items():
        if name.endswith("weight"):
            assert not torch.equal(of_one[0], of_one[1]), "it is sampled"
            mean_agrees(of_one, expected[name])
        else:
            torch.testing.assert_close(of_one[0], expected[name])


def test_every_projection_is_a_layer():
    model = convert_(nn.ModuleDict({"a": attention(), "b": attention(**SEPARATE)}), HALF)
    three = {f"{part}_proj" for part in "qkv"}
    of_each = {"a": three | {"in_proj", "out_proj"}, "b": three | {"out_proj"}}
    names = {f"{attn}.{name}" for attn, found in of_each.items() for name in found}
    assert layer_names(model) == names
    assert set(memory_state_dict(model)) == names
    layers = dict(converted_layers(model))
    sizes = {n: (one.in_features, one.out_features) for n, one in layers.items()}
    assert sizes["a.in_proj"] == (WIDTH, 3 * WIDTH)
    assert (sizes["b.k_proj"], sizes["b.v_proj"]) == ((12, WIDTH), (20, WIDTH))
    states = {id(layer.layer_state) for layer in layers.values()}
    assert len(states) == len(names)
    assert layers["a.in_proj"].weight is model["a"].in_proj_weight
    assert torch.equal(layers["a.k_proj"].weight, model["a"].in_proj_weight[WIDTH : 2 * WIDTH])
    assert torch.equal(layers["b.v_proj"].bias, model["b"].in_proj_bias[2 * WIDTH :])
    assert layers["b.v_proj"].weight is model["b"].v_proj_weight
    assert "part=1" in repr(model["a"].k_proj)
    convert_(revert_(model), HALF, overrides={"a.*": None, "a.in_proj": EXACT})
    assert {n for n in layer_names(model) if n.startswith("a")} == {"a.in_proj"}
    assert model["a"].in_proj.config == EXACT


def test_memories_are_of_the_projections_that_are_called():
    model, x = convert_(attention(), HALF), torch.randn(9, 4, WIDTH, dtype=torch.float64)
    called = {True: {"in_proj", "out_proj"}, False: {"q_proj", "k_proj", "v_proj", "out_proj"}}
    for is_self, names in called.items():
        before = {n: layer.memory.step for n, layer in converted_layers(model)}
        step(lambda m, is_self=is_self: m(x, x, x if is_self else x.clone())[0], model)
        steps = {n: layer.memory.step - before[n] for n, layer in converted_layers(model)}
        assert steps == {name: int(name in names) for name in before}
    twin = convert_(attention(), HALF)
    load_memory_state_dict(twin, copy.deepcopy(memory_state_dict(model)))
    assert_same(*(step(lambda m: m(x, x, x), m) for m in (twin, model)), rtol=0, atol=0)


def test_a_monitor_sees_what_is_called():
    model, x = convert_(attention(), HALF), torch.randn(9, 4, WIDTH, dtype=torch.float64)
    with monitor(model, every=1) as watching:
        step(lambda m: m(x, x, x)[0], model)
    assert {n: (d.k, d.rows) for n, d in watching.read().items()} == {
        "in_proj": (18, 36),
        "out_proj": (18, 36),
    }


@pytest.mark.parametrize("batch_first", [True, False])
def test_layers_of_transformers_train_and_evaluate(batch_first):
    settings = {"dropout": 0.0, "batch_first": batch_first, "dtype": torch.float64}
    encoder = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, **settings)
    decoder = nn.TransformerDecoderLayer(WIDTH, HEADS, 32, **settings)
    x, y = (torch.randn(4, rows, WIDTH, dtype=torch.float64) for rows in (4, 6))
    y = y if batch_first else y.transpose(0, 1)
    x = x if batch_first else x.transpose(0, 1)
    for dense, call in ((encoder, lambda m: m(x)), (decoder, lambda m: m(x, y))):
        ours = convert_(copy.deepcopy(dense), EXACT)
        assert_same(step(call, ours), step(call, dense), rtol=1e-9, atol=1e-10)
        with torch.no_grad():
            assert torch.equal(call(ours.eval()), call(dense.eval()))
    # Here it is known how they are called.
    assert layer_names(ours) - {"linear1", "linear2"} == {
        *(f"self_attn.{name}" for name in ("in_proj", "out_proj")),
        *(f"multihead_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    }


def test_a_layer_that_calls_its_attention_in_its_own_way_gets_all_layers():
    class Positioned(nn.TransformerDecoderLayer):
        """Queries and keys have positions added, and values have not."""

        def forward(self, x, memory):
            x = self.self_attn(x + 1, x + 1, x)[0]
            return self.multihead_attn(x, memory, memory)[0]

    class Blocks(nn.TransformerDecoderLayer):
        def _sa_block(self, x, *args, **kwargs):
            return self.self_attn(x + 1, x + 1, x)[0]

    settings = {"dropout": 0.0, "dtype": torch.float64}
    every, crossed = {"in_proj", "q_proj", "k_proj", "v_proj"}, {"q_proj", "k_proj", "v_proj"}
    of_kinds = {Positioned: (every, every), Blocks: (every, crossed)}
    for kind, (of_self, of_other) in of_kinds.items():
        dense = kind(WIDTH, HEADS, 32, **settings)
        ours = convert_(copy.deepcopy(dense), NO_MEMORY)
        names = layer_names(ours)
        assert names - {"linear1", "linear2"} == {
            *(f"self_attn.{name}" for name in of_self | {"out_proj"}),
            *(f"multihead_attn.{name}" for name in of_other | {"out_proj"}),
        }
        batch = [torch.randn(rows, 4, WIDTH, dtype=torch.float64) for rows in (4, 6)]
        # What is called is sampled.
        exact, sampled = (
            step(lambda m, batch=batch: m(*batch), model)[1]["self_attn.in_proj_weight"].chunk(3)
            for model in (dense, ours)
        )
        assert not any(map(torch.allclose, exact, sampled))
    outside = nn.TransformerEncoderLayer(WIDTH, HEADS, 32)
    outside.forward = lambda x: outside.self_attn(x + 1, x + 1, x)[0]
    assert {f"self_attn.{name}" for name in every} < layer_names(convert_(outside, NO_MEMORY))


def test_an_attention_that_has_a_name_of_ours_stays():
    model = nn.ModuleList([attention(), attention()])
    model[1].register_buffer("q_proj", torch.zeros(1))
    with pytest.warns(UserWarning, match="left as they are, being subclasses: '1.out_proj'"):
        convert_(model, HALF)
    assert [type(one) for one in model] == [MemAOPMultiheadAttention, nn.MultiheadAttention]


def test_what_cannot_be_taken_apart_leaves_all_as_they_were(monkeypatch):
    model = nn.ModuleList([attention(), attention(), nn.Linear(4, 4)])
    original = MemAOPMultiheadAttention.make_projections

    def failing(module, **options):
        if module is model[1]:
            raise RuntimeError("no projections")
        return original(module, **options)

    before = repr(model)
    monkeypatch.setattr(MemAOPMultiheadAttention, "make_projections", failing)
    with pytest.raises(RuntimeError, match="no projections"):
        convert_(model, HALF)
    assert repr(model) == before
    assert [type(one) for one in model[:2]] == [nn.MultiheadAttention] * 2
    with pytest.raises(RuntimeError, match="no projections"):
        expose_(model[1], MemAOPMultiheadAttention)
    assert type(model[1]) is nn.MultiheadAttention


def test_other_calls_than_expected_are_exact():
    """A layer of `nn.Transformer` whose attention is called from outside."""
    encoder = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dtype=torch.float64)
    dense = copy.deepcopy(encoder.self_attn)
    convert_(encoder, EXACT)
    made = inputs("values", {})
    found, expected = (step(lambda m: m(*made), m) for m in (encoder.self_attn, dense))
    assert_same(found, expected, rtol=1e-9, atol=1e-10)


def test_a_transformer_is_covered():
    model = transformer()
    batch = torch.randn(2, 6, WIDTH), torch.randn(2, 5, WIDTH)
    assert coverage(model).left["MultiheadAttention"].is_convertible
    found = plan(model, HALF, example_inputs=batch, time_budget=0.01)
    assert found.coverage.share == 1
    rows = {layer.name: layer.rows for layer in found.layers}
    assert rows["encoder.layers.0.self_attn.in_proj"] == (12,)
    assert rows["decoder.layers.0.multihead_attn.q_proj"] == (10,)
    assert rows["decoder.layers.0.multihead_attn.v_proj"] == (12,)
    assert "MemAOP" not in repr(model), "a plan leaves the model as it was"
    assert "Projection" not in repr(model)
    convert_(model, HALF)
    assert len(layer_names(model)) == 4 + 8
    for share in (coverage(model).share, coverage(model, batch).share):
        assert share >= 0.95


def test_by_default_the_library_decides(monkeypatch):
    steps_of_a_second(monkeypatch)  # the fifth one is observed
    model = convert_(transformer(), overrides={"*.linear1": None})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(6):
        model(torch.randn(2, 6, WIDTH), torch.randn(2, 5, WIDTH)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    lines = model_report(model).splitlines()
    line = next(one for one in lines if one.startswith("decoder.layers.0.multihead_attn.k_proj"))
    assert line.split()[1:3] == ["12", "exact"]
    # Rows of the layers of encoder and decoder, and of keys and values; 10 for what is left.
    seen = 12 * (4 + 2) + 10 * (4 + 2) + (10 + 12 + 12 + 10)
    share = round(100 * seen / (seen + 2 * 10 * 2))
    assert lines[-1].startswith(f"Converted layers compute about {share} % of the FLOPs")
    found = plan(revert_(model), example_inputs=(torch.randn(6, 2, WIDTH),) * 2)
    assert len(found.layers) == 4 + 8
