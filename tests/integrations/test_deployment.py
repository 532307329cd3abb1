"""A trained model leaves for other tools as a dense one does: quantised, exported, as ONNX."""

import copy

import pytest
import torch
from torch import nn

from memaop_triton import MemAOPConfig, MemAOPLinear, convert_, revert_

# PyTorch's, about what it has now and is going to drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, .* are deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, Leaf.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.trace.*` is deprecated:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def trained():
    """A converted net after a few steps, in evaluation mode, and a dense one of its weights."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3)
    )
    ours = convert_(net, MemAOPConfig(ratio=1 / 4))
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        ours(torch.randn(64, 12)).square().mean().backward()
        optimizer.step()
    return ours.eval(), revert_(copy.deepcopy(ours))


@pytest.fixture
def x():
    return torch.randn(7, 12)


def quantized(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def test_a_reverted_model_is_quantised_as_a_dense_one(trained, x):
    ours, dense = trained
    found = quantized(revert_(copy.deepcopy(ours)))
    assert [type(layer) for layer in found] == [type(layer) for layer in quantized(dense)]
    assert type(found[0]) is torch.ao.nn.quantized.dynamic.Linear
    assert torch.equal(found(x), quantized(dense)(x))


def test_a_converted_layer_is_no_nn_linear_for_dynamic_quantisation(trained, x):
    """It goes by the exact class, so `revert_` comes first."""
    ours, _ = trained
    found = quantized(ours)
    assert type(found[0]) is MemAOPLinear
    assert torch.equal(found(x), ours(x))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_is_that_of_a_dense_model(trained, x, strict):
    ours, dense = (torch.export.export(model, (x,), strict=strict) for model in trained)
    assert ours.graph_module.code == dense.graph_module.code
    assert ours.state_dict.keys() == dense.state_dict.keys()
    assert torch.equal(ours.module()(x), dense.module()(x))


@pytest.mark.slow  # imports and registers all that ONNX has
def test_an_onnx_model_is_that_of_a_dense_model(trained, x):
    for needed in ("onnx", "onnxscript"):
        pytest.importorskip(needed, reason=f"torch.onnx.export needs {needed}, not installed here")
    ours, dense = (torch.onnx.export(model, (x,), dynamo=True, verbose=False) for model in trained)
    assert str(ours.model.graph) == str(dense.model.graph)
    weights = [program.model.graph.initializers for program in (ours, dense)]
    for mine, theirs in zip(*(of.values() for of in weights), strict=True):
        assert (mine.const_value.numpy() == theirs.const_value.numpy()).all()


def test_a_trace_is_that_of_a_dense_model(trained, x):
    ours, dense = (torch.jit.trace(model, x) for model in trained)
    assert ours.code == dense.code
    assert torch.equal(ours(x), dense(x))
