import copy
import pickle

import pytest
import torch
from torch import nn

from memaop_triton import MemAOPConfig, MemAOPLinear, Rows, new_memory
from memaop_triton.backward.weight_grad import weight_grad
from tests.schemes import flat_config

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def test_copies_have_a_memory_of_their_own(memory_scheme, train_step, contents, same):
    layer = MemAOPLinear(12, 5, config=flat_config(k=3, rank=2, refresh_every=1, **memory_scheme))
    train_step(layer, torch.randn(17, 12))
    before = contents(layer.memory)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is MemAOPLinear
        assert twin.config == layer.config
        assert torch.equal(twin.weight, layer.weight)
        assert same(contents(twin.memory), before)
        train_step(twin, torch.randn(17, 12))
        assert same(contents(layer.memory), before)
        if twin.memory is not None:
            assert not same(contents(twin.memory), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversion_of_dtype_takes_the_memory_along(memory_scheme, dtype, train_step):
    layer = MemAOPLinear(12, 5, config=flat_config(k=3, rank=2, **memory_scheme))
    train_step(layer, torch.randn(17, 12))
    layer.to(dtype)
    memory = layer.memory
    if memory is not None and layer.config.row_memory:
        assert memory.x.dtype == memory.g.dtype == dtype
        assert memory.filled.dtype == torch.bool
    elif memory is not None:
        assert memory.basis.dtype == torch.float32
    train_step(layer, torch.randn(17, 12, dtype=dtype))
    assert layer.weight.grad.dtype == dtype
    assert layer.weight.grad.isfinite().all()
    train_step(layer.half(), torch.randn(17, 12).half())
    train_step(layer.double(), torch.randn(17, 12).double())


def test_memory_dtype_stays_through_conversions(train_step):
    config = MemAOPConfig(k=3, selection="topk", memory=Rows(dtype=torch.float32))
    layer = MemAOPLinear(12, 5, config=config)
    for dtype in (torch.float32, torch.bfloat16):
        train_step(layer.to(dtype), torch.randn(17, 12, dtype=dtype))
        assert layer.memory.x.dtype == torch.float32


@pytest.mark.parametrize("inside", [True, False], ids=["backward-inside", "backward-outside"])
def test_autocast_casts_like_nn_linear(memory_scheme, inside):
    config = flat_config(k=99, rank=2, **memory_scheme)
    dense = nn.Linear(12, 5)
    layer = MemAOPLinear.from_linear(copy.deepcopy(dense), config)
    x = torch.randn(17, 12)
    for module in (dense, layer):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
            assert y.dtype == torch.bfloat16
            loss = y.float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer.weight.grad, dense.weight.grad, rtol=2e-2, atol=1e-1)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=2e-2, atol=1e-1)


@pytest.mark.parametrize("enabled", [True, False])
def test_steps_under_autocast_and_without_it_alternate(memory_scheme, enabled):
    layer = MemAOPLinear(12, 5, config=flat_config(k=3, rank=2, **memory_scheme))
    for step in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled == bool(step % 2)):
            layer(torch.randn(17, 12)).float().square().sum().backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("grad_input", ["exact", "sampled"])
@pytest.mark.parametrize("memory", ["none", "subspace"])
def test_backward_inside_autocast_of_a_forward_outside_it(memory, grad_input):
    config = flat_config(k=3, rank=2, memory=memory, grad_input=grad_input)
    gradients = []
    for autocast in (False, True):
        torch.manual_seed(0)
        layer = MemAOPLinear(12, 5, config=config)
        x = torch.randn(17, 12, requires_grad=True)
        loss = layer(x).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss.backward()
        gradients.append((x.grad, layer.weight.grad))
    for outside, inside in zip(*gradients, strict=True):
        assert torch.equal(outside, inside)


def test_float16_subspace_of_large_rows_is_finite():
    config = MemAOPConfig(k=64)
    memory = new_memory(config, 2048, 8)
    x, g = (1500 * torch.randn(512, 2048)).half(), (1e-3 * torch.randn(512, 8)).half()
    for _ in range(2):
        dw = weight_grad(x, g, config, memory)
    exact = g.double().T @ x.double()
    assert dw.isfinite().all()
    assert ((dw.double() * exact).sum() / exact.square().sum() - 1).abs() < 0.5


def test_autocast_leaves_float64_alone_like_nn_linear():
    dense = nn.Linear(12, 5, dtype=torch.float64)
    x = torch.randn(17, 12, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(MemAOPLinear.from_linear(dense)(x), dense(x))
