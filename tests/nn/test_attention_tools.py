"""`nn.MultiheadAttention`, converted: what PyTorch does with modules."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from memaop_triton import (
    MemAOPConfig,
    MemAOPLinear,
    attach_optimizer,
    convert_,
    coverage,
    revert_,
)
from memaop_triton.nn.attention import MemAOPMultiheadAttention
from memaop_triton.nn.packed import MemAOPProjection, Projection
from tests.attending import (
    BATCH,
    EXACT,
    HALF,
    HEADS,
    KEYS,
    LENGTH,
    NO_MEMORY,
    SEPARATE,
    WIDTH,
    assert_same,
    attention,
    inputs,
    layer_names,
    name_of,
    step,
    transformer,
)


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


def test_projections_of_one_tensor_share_a_stash():
    model = convert_(attention(), MemAOPConfig(ratio=1 / 2, memory=None, stash="int8"))
    query, _, value = inputs("values", {}, is_causal=True)
    query, value = query.requires_grad_() * 1, value.requires_grad_() * 1
    y = model(query, query, value)[0]
    kept = {name: getattr(model, f"{name}_proj").layer_state.kept for name in "qkv"}
    assert kept["q"].stash() is kept["k"].stash() is not None
    assert kept["v"].stash() is not kept["q"].stash()
    y.sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the dense forward pass
def test_a_trace_holds_the_dense_forward_pass():
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    convert_(model, MemAOPConfig(ratio=1 / 4), filter_fn=lambda module, name: True)
    x = torch.randn(2, 5, 8)
    traced = torch.jit.trace(model, x)
    assert "PythonOp" not in str(traced.inlined_graph)
    assert "^_" not in str(traced.inlined_graph)  # a function of autograd
    assert_close(traced(x), model(x))
