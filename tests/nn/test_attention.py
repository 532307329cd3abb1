"""`nn.MultiheadAttention`, whose projections are layers once it is converted."""

import copy
import gc
import io
import itertools
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from memaop_triton import (
    MemAOPConfig,
    MemAOPLinear,
    attach_optimizer,
    convert_,
    coverage,
    load_memory_state_dict,
    memory_state_dict,
    model_report,
    monitor,
    plan,
    revert_,
)
from memaop_triton.auto import clock
from memaop_triton.nn.attention import MemAOPMultiheadAttention
from memaop_triton.nn.layer_choice import converted_layers
from memaop_triton.nn.packed import MemAOPProjection, Projection

EXACT = MemAOPConfig(ratio=1, memory=None)
HALF = MemAOPConfig(ratio=1 / 2)
NO_MEMORY = MemAOPConfig(ratio=1 / 2, memory=None)
WIDTH, HEADS, LENGTH, KEYS, BATCH = 16, 4, 5, 7, 3
SEPARATE = {"kdim": 12, "vdim": 20}


def attention(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, dtype=dtype, **settings)
    for parameter in module.parameters():
        if parameter.dim() == 1:  # biases begin as zeros
            nn.init.normal_(parameter)
    return module


def layer_names(model):
    return {name for name, _ in converted_layers(model)}


def step(call, model, seed=1):
    """Everything that a call returns, and gradients by name."""
    torch.manual_seed(seed)
    model.zero_grad()
    results = call(model)
    results = [r for r in (results if isinstance(results, tuple) else (results,)) if r is not None]
    sum(r.square().sum() for r in results).backward()
    named = model.named_parameters()
    return [r.detach() for r in results], {n: p.grad.clone() for n, p in named if p.grad is not None}


def assert_same(found, expected, **tolerance):
    assert len(found[0]) == len(expected[0])
    assert found[1].keys() == expected[1].keys()
    for one, other in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(one, other, **tolerance)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, **tolerance)


def inputs(way, settings, *, is_batched=True, is_causal=False):
    """Queries, keys and values for one of the ways to call an attention."""
    length = LENGTH if way == "self" or is_causal else KEYS
    sizes = WIDTH, settings.get("kdim", WIDTH), settings.get("vdim", WIDTH)
    made = []
    for rows, size in zip((LENGTH, length, length), sizes, strict=True):
        shape = (BATCH, rows) if settings.get("batch_first") else (rows, BATCH)
        made.append(torch.randn(*(shape if is_batched else (rows,)), size, dtype=torch.float64))
    query, key, value = made
    if way == "self":
        return query, query, query
    return (query, key, key) if way == "keys are values" else (query, key, value)


def masked(way, *, length, is_batched=True):
    """Keyword arguments by name of what is masked."""
    padding = torch.zeros(BATCH, length, dtype=torch.bool)
    padding[1, -2:] = True
    padding = padding if is_batched else padding[1]
    later = torch.ones(LENGTH, length, dtype=torch.bool).triu(1)
    each = torch.randn((BATCH if is_batched else 1) * HEADS, LENGTH, length, dtype=torch.float64)
    return {
        "nothing": {},
        "padding": {"key_padding_mask": padding},
        "later": {"attn_mask": later},
        "causal": {"attn_mask": later, "is_causal": True},
        "causal and padding": {
            "attn_mask": later,
            "is_causal": True,
            "key_padding_mask": padding,
        },
        "each head": {"attn_mask": each},
        "both": {"attn_mask": each, "key_padding_mask": -9.0 * padding.double()},
    }[way]


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


def name_of(settings):
    return "-".join(settings) or "plain"


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


def test_other_calls_than_expected_are_exact():
    """A layer of `nn.Transformer` whose attention is called from outside."""
    encoder = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dtype=torch.float64)
    dense = copy.deepcopy(encoder.self_attn)
    convert_(encoder, EXACT)
    made = inputs("values", {})
    found, expected = (step(lambda m: m(*made), m) for m in (encoder.self_attn, dense))
    assert_same(found, expected, rtol=1e-9, atol=1e-10)


def transformer():
    torch.manual_seed(0)
    return nn.Transformer(WIDTH, HEADS, 1, 1, 32, dropout=0.0, batch_first=True)


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
    # Steps of a second each: the fifth one is observed.
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=itertools.count(0.0).__next__))
    model = convert_(transformer())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(6):
        model(torch.randn(2, 6, WIDTH), torch.randn(2, 5, WIDTH)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    lines = model_report(model).splitlines()
    line = next(one for one in lines if one.startswith("decoder.layers.0.multihead_attn.k_proj"))
    assert line.split()[1:3] == ["12", "exact"]
    assert lines[-1].startswith("Converted layers compute 100 % of the FLOPs")
    found = plan(revert_(model), example_inputs=(torch.randn(6, 2, WIDTH),) * 2)
    assert len(found.layers) == 4 + 8


def test_revert_restores_classes_and_layers():
    model = transformer()
    before = {name: type(module) for name, module in model.named_modules()}
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    convert_(model, HALF)
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters
    assert isinstance(model.encoder.layers[0].self_attn, MemAOPMultiheadAttention)
    revert_(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("way", ["nothing is left", "an error"])
def test_what_is_not_converted_stays_as_it_was(way):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), attention())
    before = repr(model)
    if way == "an error":
        with pytest.raises(ValueError, match="'nobody' matches no layer"):
            convert_(model, HALF, overrides={"nobody": None})
    else:
        offered = []
        convert_(model, HALF, filter_fn=lambda _, name: offered.append(name) or name == "0")
        assert set(offered) == {"0", *(f"1.{part}_proj" for part in ("in", "out", "q", "k", "v"))}
        revert_(model)
    assert repr(model) == before
    assert vars(model[1]).keys() == vars(attention()).keys()


def test_linear_targets_leave_attention_alone():
    model = nn.TransformerEncoderLayer(WIDTH, HEADS, 32)
    with pytest.warns(UserWarning, match="NonDynamicallyQuantizableLinear"):
        convert_(model, HALF, targets="linear")
    assert layer_names(model) == {"linear1", "linear2"}
    assert type(model.self_attn) is nn.MultiheadAttention


class Own(nn.MultiheadAttention):
    def forward(self, *inputs, **options):
        return super().forward(*inputs, **options)


class Named(nn.MultiheadAttention):
    """The forward pass of `nn.MultiheadAttention`."""


def test_subclasses():
    model = nn.ModuleDict({"own": Own(WIDTH, HEADS), "named": Named(WIDTH, HEADS)})
    model["linear"] = nn.Linear(64, 64)
    with pytest.warns(UserWarning, match="left as they are, being subclasses"):
        convert_(model, HALF)
    assert layer_names(model) == {"linear"}
    left = coverage(model).left
    assert left["Own"].reason == "has a forward pass of its own"
    assert left["Named"].reason == "a subclass, which a filter_fn can take"
    assert left["Named"].is_convertible
    revert_(model)
    convert_(model, HALF, filter_fn=lambda _, name: name.startswith("named"))
    assert layer_names(model) == {f"named.{part}_proj" for part in ("in", "out", "q", "k", "v")}
    assert type(model["named"]).__name__ == "MemAOPNamed"
    assert isinstance(model["named"], Named)
    x = torch.randn(LENGTH, BATCH, WIDTH)
    step(lambda m: m(x, x, x), model["named"])
    twin = pickle.loads(pickle.dumps(model["named"]))
    assert type(twin) is type(model["named"])
    assert type(revert_(model)["named"]) is Named


def test_an_attribute_of_the_name_of_a_projection_is_kept():
    model = attention()
    model.q_proj = nn.Linear(WIDTH, WIDTH)
    with pytest.warns(UserWarning, match="NonDynamicallyQuantizableLinear"):
        convert_(model, HALF)
    assert layer_names(model) == {"q_proj"}
    assert type(model) is nn.MultiheadAttention


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": lambda model: torch.load(_saved(model), weights_only=False),
}


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("settings", [{}, SEPARATE], ids=name_of)
def test_copies(way, settings):
    made = inputs("values", settings)
    model = convert_(attention(**settings), HALF)
    step(lambda m: m(*made)[0], model)
    twin = way(model)
    assert type(twin) is type(model)
    for name in ("q_proj", "k_proj"):
        theirs, mine = model.get_submodule(name), twin.get_submodule(name)
        assert mine.weight_parameter is not theirs.weight_parameter
        assert any(mine.weight_parameter is parameter for parameter in twin.parameters())
        assert mine.memory is not theirs.memory
    for seed in range(3):
        assert_same(*(step(lambda m: m(*made), m, seed) for m in (twin, model)), rtol=0, atol=0)
    assert type(revert_(twin)) is nn.MultiheadAttention


def test_a_projection_follows_conversions_and_new_parameters():
    model = convert_(attention(), HALF).to(torch.float32)
    assert model.in_proj.weight.dtype == torch.float32
    model.load_state_dict(attention(torch.float32).state_dict(), assign=True)
    assert model.in_proj.weight is model.in_proj_weight
    x = torch.randn(LENGTH, BATCH, WIDTH)
    step(lambda m: m(x, x, x), model)
    dense = attention(torch.float32)
    values = {n: torch.randn_like(p) for n, p in dense.named_parameters()}
    for training in (True, False):
        found = (
            torch.func.functional_call(m.train(training), values, (x, x, x)) for m in (model, dense)
        )
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_a_converted_attention_is_freed_without_the_collector():
    gc.collect()
    gc.disable()
    try:
        model = convert_(attention(), HALF)
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_autocast():
    dense = attention(torch.float32)
    ours, x = convert_(copy.deepcopy(dense), EXACT), torch.randn(LENGTH, BATCH, WIDTH)
    for need_weights in (True, False):

        def call(model, need_weights=need_weights):
            with torch.autocast("cpu", torch.bfloat16):
                return model(x, x, x, need_weights=need_weights)

        found, expected = step(call, ours), step(call, dense)
        assert [r.dtype for r in found[0]] == [r.dtype for r in expected[0]]
        assert_same(found, expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_nothing(use_reentrant):
    model = convert_(attention(dropout=0.2), HALF)
    twin, x = copy.deepcopy(model), torch.randn(9, 4, WIDTH, dtype=torch.float64).requires_grad_()

    def recomputed(m):
        return checkpoint(lambda a: m(a, a, a)[0], x, use_reentrant=use_reentrant)

    for seed in range(3):
        expected = step(lambda m: m(x, x, x)[0], model, seed)
        assert_same(step(recomputed, twin, seed), expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("config", [NO_MEMORY, HALF], ids=["none", "subspace"])
def test_compiled(config):
    torch._dynamo.reset()
    settings = {"dropout": 0.0, "dtype": torch.float64}
    model = convert_(nn.TransformerDecoderLayer(WIDTH, HEADS, 32, **settings), config)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x, y = (torch.randn(rows, BATCH, WIDTH, dtype=torch.float64) for rows in (LENGTH, KEYS))
    for seed in range(3):
        expected = step(lambda m: m(x, y), model, seed)
        found = step(lambda _: compiled(x, y), twin, seed)
        assert_same(found, expected, rtol=1e-9, atol=1e-10)
    torch._dynamo.reset()


def test_a_row_memory_follows_the_learning_rate():
    model, x = attention(), torch.randn(9, 4, WIDTH, dtype=torch.float64)
    convert_(model, MemAOPConfig.paper(ratio=1 / 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach_optimizer(model, optimizer)
    for _ in range(2):
        step(lambda m: m(x, x, x)[0], model)
        optimizer.step()
    assert model.in_proj.memory.rows == 36
    with pytest.raises(ValueError, match="does not hold the weight of layer 'in_proj'"):
        attach_optimizer(model, torch.optim.SGD(model.out_proj.parameters(), lr=0.1))


def test_parametrised_and_pruned_after_conversion():
    made = inputs("self", {})
    for change in (
        lambda m: parametrizations.weight_norm(m, "in_proj_weight"),
        lambda m: prune.l1_unstructured(m, "in_proj_weight", 0.5),
    ):
        ours, dense = convert_(attention(), EXACT), attention()
        change(ours), change(dense)
        found, expected = (step(lambda m: m(*made), m) for m in (ours, dense))
        assert_same(found, expected, rtol=1e-9, atol=1e-10)
        assert ours.in_proj.weight_parameter is None
    model = convert_(attention(), HALF)
    parametrizations.weight_norm(model, "in_proj_weight")
    with pytest.raises(ValueError, match="parametrised after it was converted"):
        revert_(model)
    assert isinstance(model.in_proj, MemAOPProjection), "nothing is reverted"


def test_frozen_projections():
    model = convert_(attention(), HALF)
    model.in_proj_weight.requires_grad_(False)
    made = inputs("self", {})
    _, gradients = step(lambda m: m(*made), model)
    assert "in_proj_weight" not in gradients
    assert model.in_proj.memory.step == 0


def test_a_traced_model_calls_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = attention()

        def forward(self, x):
            return self.attn(x, x, x, need_weights=False)[0]

    model = convert_(Model(), EXACT)
    graph = torch.fx.symbolic_trace(model)
    assert "attn" in [node.target for node in graph.graph.nodes if node.op == "call_module"]
    (x, *_), seen = inputs("self", {}), model(inputs("self", {})[0])
    assert seen.shape == graph(x).shape
    torch.testing.assert_close(graph(x), model(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_script_is_refused():
    model = convert_(nn.Sequential(attention()), HALF)
    with pytest.raises(RuntimeError, match=r"cannot compile MemAOPMultiheadAttention: revert_"):
        torch.jit.script(model)
    assert isinstance(model[0], MemAOPMultiheadAttention)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"is_causal": True}, RuntimeError, "is_causal=True is a hint about attn_mask"),
        ({"attn_mask": torch.zeros(2, 2).double()}, RuntimeError, r"should have \(5, 5\)"),
        (
            {"attn_mask": torch.zeros(2, 5, 5).double()},
            RuntimeError,
            r"attn_mask has shape \(2, 5, 5\), but should have \(12, 5, 5\)",
        ),
        (
            {"key_padding_mask": torch.zeros(BATCH, 4).double()},
            RuntimeError,
            r"key_padding_mask has shape \(3, 4\), but should have \(3, 5\)",
        ),
        ({"attn_mask": torch.zeros(5, 5).int()}, AssertionError, "only bool and floating"),
        ({"key_padding_mask": torch.zeros(5).double()}, AssertionError, "key_padding_mask"),
    ],
)
def test_errors(options, error, message):
    made = inputs("self", {})
    with pytest.raises(error, match=message):
        convert_(attention(), HALF)(*made, **options)
    with pytest.raises((error, AssertionError)):  # PyTorch refuses the same
        attention()(*made, **options)


def test_queries_of_another_width_are_refused():
    x = torch.randn(LENGTH, BATCH, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match="query has 12 features, not 16"):
        convert_(attention(), HALF)(x, x, x)


def test_layers_of_a_class_of_ours_are_named_by_it():
    model = convert_(attention(), HALF)
    assert isinstance(model.out_proj, MemAOPLinear)
    assert type(model.out_proj.revert_()).__name__ == "NonDynamicallyQuantizableLinear"
    assert type(model.in_proj.revert_()) is Projection
    made = inputs("self", {})
    found, expected = (step(lambda m: m(*made), m) for m in (model, attention()))
    assert_same(found, expected, rtol=1e-9, atol=1e-10)
