"""Layers that store their weight as [in, out]: the same numbers as of `nn.Linear`, no copies."""

import copy
import io
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from memaop_triton import (
    MemAOPConfig,
    MemAOPLayer,
    MemAOPLinear,
    allocate_,
    attach_optimizer,
    convert_,
    load_memory_state_dict,
    memory_state_dict,
    model_report,
    monitor,
    plan,
    revert_,
)
from memaop_triton.backward.weight_grad import weight_and_bias_grad
from memaop_triton.bench.measure import Clock
from memaop_triton.memory.kinds import new_memory
from memaop_triton.memory.stash import Stash
from memaop_triton.nn.conv1d import MemAOPConv1D
from memaop_triton.nn.layer_state import LayerState
from tests.auto.training import steps_of_a_second
from tests.schemes import LEGAL, flat_config, label
from tests.transposed import Conv1D, register, twin_of

M, N, P = 40, 24, 20
ops = torch.ops.memaop_triton
SIDES = [{"selection": "priority", "memory": "subspace", "side": s} for s in ("input", "grad")]


@pytest.fixture(autouse=True)
def _as_in_transformers(monkeypatch):
    modules = {}
    register(modules)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def conv():
    return Conv1D(P, N)


def train(layer, batches):
    """The gradients of every batch: of weight (as [P, N]), bias and input."""
    torch.manual_seed(3)
    found = []
    for batch in batches:
        x = batch.clone().requires_grad_()
        layer.zero_grad()
        layer(x).square().sum().backward()
        dw = layer.weight.grad
        assert dw.is_contiguous()
        found.append((dw.t() if isinstance(layer, Conv1D) else dw, layer.bias.grad, x.grad))
    return found


def batches(count=3, rows=M):
    return [torch.randn(rows, N) for _ in range(count)]


NO_MEMORY = {"selection": "priority", "memory": "none"}
CASES = [
    *LEGAL,
    *SIDES,
    *(scheme | {"block_rows": 16} for scheme in (*LEGAL[:4], *SIDES)),
    *(scheme | {"stash": "int8"} for scheme in (NO_MEMORY, *SIDES)),
    *(scheme | {"stash": "int8", "ratio": 1.0} for scheme in (NO_MEMORY, *SIDES)),
    *(scheme | {"grad_input": "sampled"} for scheme in (NO_MEMORY, *SIDES)),
    *(scheme | {"grad_input": "projected"} for scheme in SIDES),
    *(NO_MEMORY | {"scores": scores} for scores in ("columns", "grad")),
    *(NO_MEMORY | {"ratio": ratio} for ratio in (1.0, 1 / M)),
]


@pytest.mark.parametrize("settings", CASES, ids=label)
def test_gradients_are_those_of_a_linear_layer(conv, settings):
    config = flat_config(**{"ratio": 1 / 4, "rank": 4, "refresh_every": 2} | settings)
    linear, data = MemAOPLinear.adopt_(twin_of(conv), config), batches()
    ours = convert_(conv, config)
    assert isinstance(ours, MemAOPConv1D)
    for found, expected in zip(train(ours, data), train(linear, data), strict=True):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [M, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", CASES, ids=label)
def test_no_step_makes_a_copy_to_transpose(settings, dtype, rows, generator):
    settings = {k: v for k, v in settings.items() if k != "grad_input"}
    config = flat_config(**{"ratio": 1 / 4, "rank": 4} | settings)
    x, g = torch.randn(rows, N).to(dtype), torch.randn(rows, P).to(dtype)
    found = []
    for is_transposed in (True, False):
        kept = x if config.stash == "exact" or rows == 0 else Stash.of(x, 8, None)
        memory, draws = new_memory(config, N, P), generator(5)
        dw = weight_and_bias_grad(
            kept, g, config, memory, generator=draws, is_transposed=is_transposed
        ).weight
        found.append(dw)
        assert dw.shape == (P, N)
        assert (dw.t() if is_transposed else dw).is_contiguous()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    if config.stash == "exact":  # else each has a dither of its own
        torch.testing.assert_close(*found, rtol=tolerance, atol=10 * tolerance)


def test_a_backward_pass_needs_no_more_memory_than_that_of_a_linear_layer():
    conv = Conv1D(512, 384)
    linear = twin_of(conv)
    config, x = MemAOPConfig(ratio=1 / 4, memory=None), torch.randn(1024, 384)

    def peak_of(layer):
        y = layer(x)
        g = torch.ones_like(y)
        torch.autograd.backward(y, g, retain_graph=True)
        layer.zero_grad()
        return Clock(torch.device("cpu")).peak_bytes(
            lambda: torch.autograd.backward(y, g, retain_graph=True)
        )

    dense = peak_of(conv)
    ours, expected = peak_of(convert_(conv, config)), peak_of(MemAOPLinear.adopt_(linear, config))
    assert abs(ours - expected) < 0.01 * conv.weight.nbytes
    exact = convert_(revert_(conv), MemAOPConfig(ratio=1.0, memory=None))
    assert abs(peak_of(exact) - dense) < 0.01 * conv.weight.nbytes


@pytest.mark.parametrize("memory", ["none", "subspace"])
@pytest.mark.parametrize("sampled", [False, True])
def test_opcheck(memory, sampled):
    config = flat_config(ratio=1 / 4, memory=memory, refresh_every=1000)
    state = LayerState(config, new_memory(config, N, P), is_transposed=True)
    x, g, weight = torch.randn(M, N), torch.randn(M, P), torch.randn(N, P).t()
    settings = {"bias_grad": True, "transposed": True}
    if sampled:
        settings |= {"weight_grad": True, "is_frozen": False}
        arguments = x, [], g, weight, state.handle, state.order
        torch.library.opcheck(ops.sampled_backward.default, arguments, settings)
    else:
        arguments = x, [], g, state.handle, state.order
        torch.library.opcheck(ops.weight_grad.default, arguments, settings)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("stash", ["exact", "int8"])
def test_a_compiled_model_computes_what_an_eager_one_does(stash):
    torch._dynamo.reset()
    dense = nn.Sequential(Conv1D(32, N), nn.Tanh(), Conv1D(P, 32))
    results = []
    for compiled in (False, True):
        model = convert_(copy.deepcopy(dense), MemAOPConfig(ratio=1 / 4, stash=stash))
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        torch.manual_seed(3)
        for x in (torch.ones(M, N), torch.full((M, N), 2.0)):
            run(x + torch.arange(N) / N).square().sum().backward()
        results.append([p.grad for p in model.parameters()])
        assert all(gradient.is_contiguous() for gradient in results[-1])
    if stash == "exact":  # rounding draws in another order when compiled
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-3)


def test_exact_passes_are_those_of_the_dense_class(conv, monkeypatch):
    x = torch.randn(3, 5, N)
    expected, count = conv(x), []
    dense = Conv1D.forward
    monkeypatch.setattr(Conv1D, "forward", lambda *args: count.append(1) or dense(*args))
    layer = convert_(conv, MemAOPConfig(ratio=1 / 4))
    torch.testing.assert_close(layer(x), expected)
    assert not count
    assert torch.equal(layer.eval()(x), expected)
    layer.train().layer_state.is_native = True
    assert torch.equal(layer(x), expected)
    assert len(count) == 2
    assert torch.equal(revert_(layer)(x), expected)


def test_converting_leaves_the_layer_what_it_was(conv):
    before, state = conv.weight, {name: t.clone() for name, t in conv.state_dict().items()}
    layer = convert_(conv, MemAOPConfig(ratio=1 / 4))
    assert layer is conv
    assert layer.weight is before
    assert isinstance(layer, MemAOPLayer)
    assert isinstance(layer, Conv1D)
    assert not isinstance(layer, nn.Linear), "its weight is not [out, in]"
    assert (layer.in_features, layer.out_features) == (N, P)
    assert repr(layer).startswith("MemAOPConv1D(in_features=24, out_features=20, ratio=0.25, sel")
    after = layer.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)
    Conv1D(P, N).load_state_dict(after)
    layer.load_state_dict(state)
    with pytest.raises(ValueError, match="converted already"):
        convert_(layer)
    assert type(revert_(layer)) is Conv1D
    assert repr(layer) == f"Conv1D(nf={P}, nx={N})"


def test_releases_that_keep_only_the_number_of_outputs(conv):
    del conv.nx
    assert convert_(conv, MemAOPConfig(ratio=1 / 4)).in_features == N


@pytest.mark.parametrize("ratio", [1 / 4, "auto"])
def test_copies_train_alike(conv, ratio):
    layer = convert_(conv, MemAOPConfig(ratio=ratio))
    data = batches()
    train(layer, data[:1])
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    twins = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ]
    expected = train(layer, data[1:])
    for twin in twins:
        assert type(twin) is type(layer)
        assert twin.layer_state.is_transposed
        for ours, theirs in zip(train(twin, data[1:]), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_memories_are_saved_and_loaded(conv):
    config = MemAOPConfig.paper(k=8)
    twin = convert_(copy.deepcopy(conv), config)
    layer = convert_(conv, config)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attach_optimizer(layer, optimizer)
    train(layer, batches(2))
    assert layer.memory.state_dict()["x"].shape == (M, N)
    load_memory_state_dict(twin, memory_state_dict(layer))
    attach_optimizer(twin, torch.optim.SGD(twin.parameters(), lr=0.1))
    data = batches(1)
    (ours,), (theirs,) = train(layer, data), train(twin, data)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_autocast_and_checkpointing(conv):
    config = MemAOPConfig(ratio=1 / 4)
    linear, layer, (x,) = twin_of(conv), convert_(conv, config), batches(1)
    MemAOPLinear.adopt_(linear, config)
    found = []
    for one in (layer, linear):
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16):
            y = checkpoint(one, x, use_reentrant=False)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        found.append(one.weight.grad)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0].t(), found[1], rtol=2e-2, atol=0.5)


def test_monitors_and_allocation_take_it(conv):
    config = MemAOPConfig(ratio=1 / 4, memory=None)
    model = convert_(nn.Sequential(conv, nn.Tanh(), Conv1D(64, P)), config)
    with monitor(model, every=1) as watch:
        for x in batches(3):
            model(x).square().sum().backward()
        assert set(watch.read()) == {"0", "2"}
        allocate_(model, watch, budget=1 / 2)
    assert {layer.config.ratio for layer in (model[0], model[2])} != {1 / 4}


def test_plan_measures_it_and_auto_observes(conv, monkeypatch):
    model = nn.Sequential(conv, nn.Tanh(), Conv1D(8, P))
    x = torch.randn(M, N)
    found = plan(model, MemAOPConfig(ratio=1 / 8), example_inputs={"input": x}, time_budget=0.01)
    assert [layer.shape for layer in found.layers] == [f"{M}×{N}×{P}", f"{M}×{P}×8"]
    assert found.coverage.share == 1.0
    steps_of_a_second(monkeypatch)  # the fifth one is observed
    convert_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for x in batches(10):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    controller = model[0].layer_state.controller
    assert [len(seen) for seen in controller.seen.values()] == [2, 2]
    assert all(one.square > 0 for seen in controller.seen.values() for one in seen)
    assert "Converted layers compute 100 % of the FLOPs" in model_report(model)


def test_what_cannot_be_converted(conv):
    class Scaled(Conv1D):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="Scaled has a forward pass of its own"):
        convert_(Scaled(P, N), filter_fn=lambda module, name: True)
    layer = convert_(conv, MemAOPConfig(ratio=1 / 4))
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    with pytest.raises(ValueError, match="parametrised after it was converted"):
        revert_(layer)


def test_a_traced_model_calls_the_layer(conv):
    model = convert_(nn.Sequential(conv, nn.Tanh()), MemAOPConfig(ratio=1 / 4))
    graph = torch.fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes][1:3] == ["call_module"] * 2
    graph(torch.randn(M, N)).square().sum().backward()
    assert isinstance(graph.get_submodule("0"), MemAOPConv1D)
    assert conv.weight.grad.is_contiguous()


def test_without_transformers_it_is_any_module(monkeypatch, conv):
    monkeypatch.delitem(sys.modules, "transformers.pytorch_utils")
    with pytest.raises(
        ValueError, match="no layer to convert: 0 layers of targets='all' in Conv1D"
    ):
        convert_(conv)
