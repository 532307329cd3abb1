import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memaop_triton import MemAOPConfig, MemAOPLinear, Subspace, memaop_linear, new_memory
from memaop_triton.backward.weight_grad import weight_grad
from tests.pairwise import pairwise
from tests.schemes import LEGAL, flat_config

RESIDUAL = MemAOPConfig(k=3, selection="topk", memory="residual")
DEFAULT = MemAOPConfig(k=3, memory=Subspace(rank=2))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def pair(config=RESIDUAL, bias=True, dtype=None):
    dense = nn.Linear(12, 5, bias=bias, dtype=dtype)
    return dense, MemAOPLinear.from_linear(copy.deepcopy(dense), config)


SHAPES = [(12,), (17, 12), (3, 4, 12), (2, 1, 5, 12), (0, 12), (3, 0, 12)]


@pytest.mark.parametrize(
    ("scheme", "shape", "dtype", "bias"), pairwise(LEGAL, SHAPES, DTYPES, [True, False])
)
def test_forward_and_exact_gradients_equal_nn_linear(scheme, dtype, bias, shape):
    dense, ours = pair(flat_config(k=3, rank=2, **scheme), bias, dtype)
    x = torch.randn(shape).to(dtype)
    grads = []
    for layer in (dense, ours):
        layer_input = x.clone().requires_grad_()
        y = layer(layer_input)
        y.square().sum().backward()
        grads.append((y, layer_input.grad, layer.bias.grad if bias else torch.zeros(1)))
        assert layer.weight.grad.shape == (5, 12)
    assert torch.equal(grads[0][0], grads[1][0])
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    torch.testing.assert_close(grads[0][1:], grads[1][1:], **tolerance)
    assert x.numel() or not ours.weight.grad.any()


def test_gradients_are_those_of_weight_grad_on_flattened_rows_and_add_up(memory_scheme):
    config = flat_config(k=3, rank=2, **memory_scheme)
    _, layer = pair(config, dtype=torch.float64)
    own, memory = (new_memory(config, 12, 5) for _ in range(2))
    weight = layer.weight.detach().clone().requires_grad_()
    total = torch.zeros(5, 12).double()
    for seed in range(3):
        x, g = torch.randn(3, 4, 12).double(), torch.randn(3, 4, 5).double()
        torch.manual_seed(seed)
        layer(x).backward(g)
        torch.manual_seed(seed)
        memaop_linear(x, weight, None, config, own).backward(g)
        torch.manual_seed(seed)
        total += weight_grad(x.view(12, 12), g.view(12, 5), config, memory)
    assert torch.equal(layer.weight.grad, total)
    assert torch.equal(weight.grad, total)


def test_sampled_input_gradient_and_weight_gradient_use_the_same_rows(unbiased, selections):
    config = MemAOPConfig(k=3, memory="none", grad_input="sampled", **unbiased)
    _, layer = pair(config, dtype=torch.float64)
    x, g = torch.randn(17, 12).double().requires_grad_(), torch.randn(17, 5).double()
    dx, dw = torch.autograd.grad(layer(x), (x, layer.weight), g)
    ((indices, weights),) = selections
    scale = torch.zeros(17, 1, dtype=torch.float64).index_add_(0, indices, weights[:, None])
    torch.testing.assert_close(dx, scale * (g @ layer.weight))
    torch.testing.assert_close(dw, (scale * g).T @ x)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 17), (129, 3), (0, 3), (3, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_new_layer_has_the_default_configuration_and_any_size(inputs, outputs):
    layer = MemAOPLinear(inputs, outputs)
    assert layer.config == MemAOPConfig()
    x = torch.randn(40, inputs, requires_grad=True)
    layer(x).square().sum().backward()
    assert layer.weight.grad.shape == (outputs, inputs)
    assert layer.weight.grad.any() == bool(inputs * outputs)
    assert x.grad.shape == x.shape
    assert outputs or not x.grad.any()


@pytest.mark.parametrize("grad_input", ["exact", "sampled"])
@pytest.mark.parametrize("memory", ["none", "subspace"])
@pytest.mark.parametrize("frozen", ["weight", "bias", "input", "all but input"])
def test_frozen_parts_get_no_gradient(grad_input, memory, frozen):
    config = flat_config(k=3, rank=2, memory=memory, grad_input=grad_input)
    layer = MemAOPLinear(12, 5, config=config)
    x = torch.randn(17, 12, requires_grad=frozen != "input")
    layer.weight.requires_grad_(frozen not in ("weight", "all but input"))
    layer.bias.requires_grad_(frozen not in ("bias", "all but input"))
    state = torch.get_rng_state()
    layer(x).square().sum().backward()
    for tensor in (layer.weight, layer.bias, x):
        assert (tensor.grad is not None) == tensor.requires_grad
    if not layer.weight.requires_grad:
        # A sampled dX draws, keeps a basis of G's side, and counts.
        sampled = grad_input == "sampled" and x.requires_grad
        assert torch.equal(torch.get_rng_state(), state) != sampled
        if memory != "none":
            assert layer.memory.nbytes == (5 * 4 if sampled else 0)
            assert layer.memory.step == (1 if sampled else 0)


def test_evaluation_is_exact_and_leaves_the_memory_alone():
    dense, layer = pair(DEFAULT)
    x = torch.randn(17, 12)
    with torch.no_grad():
        assert not layer(x).requires_grad
    layer.eval()
    for module in (dense, layer):
        module(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, dense.weight.grad)
    assert layer.memory.step == 0
    layer.train()(x).sum().backward()
    assert layer.memory.step == 1


def test_from_linear_shares_parameters_hooks_and_mode():
    dense = nn.Linear(12, 5).eval()
    calls = []
    dense.register_forward_hook(lambda *_: calls.append("forward"))
    dense.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer = MemAOPLinear.from_linear(dense, RESIDUAL)
    assert type(dense) is nn.Linear
    assert layer.weight is dense.weight
    assert layer.bias is dense.bias
    assert not layer.training
    layer.train()(torch.randn(7, 12, requires_grad=True)).sum().backward()
    assert calls == ["forward", "backward"]
    assert not dense.training
    layer.register_forward_hook(lambda *_: calls.append("own"))
    dense(torch.randn(7, 12))
    assert "own" not in calls


def test_layer_used_twice_in_one_forward_touches_its_memory_twice(contents):
    layer = MemAOPLinear(6, 6, config=RESIDUAL).double()
    memory = new_memory(RESIDUAL, 6, 6)
    x = torch.randn(8, 6).double()
    hidden = layer(x)
    out = layer(hidden)
    g_out = torch.ones_like(out)
    g_hidden = g_out @ layer.weight
    expected = weight_grad(hidden.detach(), g_out, RESIDUAL, memory)
    expected = expected + weight_grad(x, g_hidden.detach(), RESIDUAL, memory)
    out.sum().backward()
    torch.testing.assert_close(layer.weight.grad, expected)
    torch.testing.assert_close(contents(layer.memory), contents(memory))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("config", [RESIDUAL, DEFAULT], ids=["residual", "subspace"])
def test_activation_checkpointing_changes_nothing(reentrant, config, contents):
    _, layer = pair(config)
    other = copy.deepcopy(layer)
    for step in range(3):
        results = []
        for module, checkpointed in ((layer, False), (other, True)):
            torch.manual_seed(step)
            module.zero_grad()
            x = torch.randn(17, 12, requires_grad=True)
            y = checkpoint(module, x, use_reentrant=reentrant) if checkpointed else module(x)
            torch.manual_seed(step)
            y.square().sum().backward()
            results.append((module.weight.grad, x.grad, contents(module.memory)))
        torch.testing.assert_close(*results, rtol=0, atol=0)


def test_repr_shows_the_settings():
    sampled = MemAOPConfig(budget=1 / 4, memory="none", grad_input="sampled")
    for config, text in (
        (RESIDUAL, "k=3, selection=topk, memory=residual"),
        (MemAOPConfig(), "ratio=0.125, selection=priority, memory=subspace, rank=1"),
        (sampled, "budget=0.25, selection=priority, memory=none, grad_input=sampled"),
    ):
        layer = MemAOPLinear(12, 5, config=config)
        assert repr(layer) == f"MemAOPLinear(in_features=12, out_features=5, bias=True, {text})"
