"""Converted convolutions with the rest of PyTorch and of the library."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from memaop_triton import (
    MemAOPConfig,
    MemAOPConv2d,
    auto_freeze,
    compress_saved,
    convert_,
    load_memory_state_dict,
    memory_state_dict,
    model_report,
    monitor,
    plan,
    revert_,
)
from memaop_triton.auto import agenda
from tests.convolutions import gradients
from tests.nn.saving import held_exactly


def test_autocast():
    layer = MemAOPConv2d(3, 4, 3, config=MemAOPConfig(ratio=1))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        expected = nn.functional.conv2d(x, layer.weight, layer.bias)
    assert torch.equal(y, expected)
    assert layer.weight.grad.dtype == torch.float32
    assert x.grad.dtype == torch.float32


def test_checkpointing_and_a_layer_used_twice():
    layer = MemAOPConv2d(3, 3, 3, padding=1, config=MemAOPConfig(ratio=1 / 2, memory=None))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    found = []
    for run in (
        lambda x: layer(layer(x)),
        lambda x: checkpoint(layer, layer(x), use_reentrant=False),
    ):
        torch.manual_seed(3)
        found.append(torch.autograd.grad(run(x).square().sum(), [layer.weight])[0])
    assert torch.equal(*found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's
def test_compiled_is_eager_to_rounding():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    convert_(model, MemAOPConfig(ratio=1 / 4))
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 8, 8)
    for _ in range(3):
        both = []
        for run in (model, compiled):
            torch.manual_seed(5)
            both.append(torch.autograd.grad(run(x).square().sum(), list(run.parameters())))
        for a, b in zip(*both, strict=True):
            assert_close(a, b)


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:Using padding='same'")
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_scripted_and_traced_layers_are_dense(mode):
    dense = nn.Conv2d(3, 4, 2, padding="same", padding_mode=mode)
    model = nn.Sequential(MemAOPConv2d.from_conv(dense))
    x = torch.randn(2, 3, 6, 6)
    for made in (torch.jit.script(model), torch.jit.trace(model, x)):
        file = io.BytesIO()
        torch.jit.save(made, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        assert torch.equal(loaded(x), dense(x))
        for found, exact in zip(gradients(loaded, x), gradients(dense, x), strict=True):
            assert_close(found, exact)


def test_parametrised_weight():
    layer = nn.Conv2d(3, 4, 3)
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    model = nn.Sequential(layer)
    convert_(model, MemAOPConfig(ratio=1), filter_fn=lambda module, name: True)
    x = torch.randn(2, 3, 6, 6)
    found = gradients(model, x)
    exact = gradients(revert_(model), x)
    for a, b in zip(found, exact, strict=True):
        assert_close(a, b)


def test_copies_and_saved_memories():
    torch.manual_seed(4)
    model = convert_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), MemAOPConfig())
    x = torch.randn(4, 3, 10, 10)
    gradients(model, x)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(memory_state_dict(model), file)
    file.seek(0)
    third = convert_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), MemAOPConfig())
    third.load_state_dict(model.state_dict())
    load_memory_state_dict(third, torch.load(file, weights_only=True))
    results = []
    for one in (model, twin, third):
        torch.manual_seed(7)
        results.append(gradients(one, x)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(2, 8, 12, 12)
    counts = []
    for ratio in (1, 1 / 8):
        layer = MemAOPConv2d(8, 8, 3, config=MemAOPConfig(ratio=ratio, memory=None))
        with FlopCounterMode(display=False) as counter:
            layer(x).sum().backward()
        counts.append(counter.get_total_flops())
    dense = 2 * 200 * 72 * 8
    assert counts[0] == 2 * dense
    assert dense < counts[1] < 1.3 * dense


@pytest.mark.parametrize("channels_last", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_plan_monitor_and_report(channels_last):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Conv2d(8, 8, 1),
        nn.Flatten(),
        nn.Linear(8 * 36, 4),
    )
    x = torch.randn(8, 3, 6, 6)
    if channels_last:
        model, x = (
            model.to(memory_format=torch.channels_last),
            x.to(memory_format=torch.channels_last),
        )

    def loss(y):
        return y.square().mean()

    found = plan(model, MemAOPConfig(), example_inputs=x, loss_fn=loss, time_budget=0.2)
    assert [row.name for row in found.layers] == ["0", "1", "2", "4"]
    assert [(row.rows, row.in_features) for row in found.layers][:3] == [
        ((288,), 27),
        ((288,), 36),
        ((288,), 8),
    ]
    assert all(row.dense_seconds > 0 for row in found.layers)
    assert found.coverage.share == 1
    undecided = plan(model, example_inputs=x, loss_fn=loss, batches=[torch.randn_like(x)])
    assert [row.rows for row in undecided.layers][:3] == [(288,)] * 3
    convert_(model, MemAOPConfig(ratio=1 / 4))
    with monitor(model, every=1) as watching:
        for _ in range(3):
            loss(model(x)).backward()
    diagnostics = watching.read()
    assert set(diagnostics) == {"0", "1", "2", "4"}
    assert diagnostics["1"].rows == 288


def test_the_library_decides(monkeypatch):
    """Under `ratio="auto"` convolutions are observed, timed and sampled like linear layers."""
    monkeypatch.setattr(agenda, "LEFT_ALONE", 0.0)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.Conv2d(32, 32, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    )
    convert_(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = torch.randn(16, 3, 12, 12), torch.randint(4, (16,))
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    report = str(model_report(model))
    assert "2304" in report  # rows of each convolution: they were seen
    auto_freeze(model)
    state = memory_state_dict(model)
    load_memory_state_dict(model, state)


def test_inputs_are_compressed_with_those_of_other_operations():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 32, 3))
    convert_(model, MemAOPConfig(ratio=1))
    x = torch.randn(8, 3, 32, 32)
    exact = gradients(model, x)[2]
    held = [name for name, saved in held_exactly(model(x)) if saved.form is not None]
    assert "_MemAOPConvFunctionBackward" in held
    with compress_saved(model):
        y = model(x)
        assert not [name for name, saved in held_exactly(y) if saved.form is not None]
        found = gradients(model, x)[2]
    error = torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact)
    assert 0 < error < 0.02
