"""Converted convolutions: exact where all rows are computed, unbiased where some are."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.testing import assert_close

from memaop_triton import (
    MemAOPConfig,
    MemAOPConv1d,
    MemAOPConv2d,
    MemAOPConv3d,
    MemAOPLayer,
    MemAOPLinear,
    Subspace,
    convert_,
    coverage,
    revert_,
)
from memaop_triton.nn.conv import CONVOLUTIONS
from memaop_triton.nn.layer_choice import adopt_
from tests.convolutions import convolutions, gradients
from tests.pairwise import pairwise
from tests.schemes import UNBIASED

OURS = {1: MemAOPConv1d, 2: MemAOPConv2d, 3: MemAOPConv3d}


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # PyTorch's, of a copy it makes
@settings(max_examples=200, deadline=None, derandomize=True)
@given(convolutions())
def test_all_rows_are_the_dense_gradient(drawn):
    dense, x = drawn
    ours = CONVOLUTIONS[type(dense)].from_conv(dense, MemAOPConfig(ratio=1))
    g = torch.randn_like(dense(x))
    assert torch.equal(ours(x), dense(x))
    for found, exact in zip(gradients(ours, x, g), gradients(dense, x, g), strict=True):
        assert_close(found, exact)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions())
def test_k_rows_that_alone_have_a_gradient_are_exact(drawn):
    dense, x = drawn
    ours = CONVOLUTIONS[type(dense)].from_conv(dense, MemAOPConfig(k=3, memory=None))
    y = dense(x)
    g = torch.zeros_like(y)
    flat = g.movedim(1, -1).reshape(-1, dense.out_channels)
    few = torch.randperm(len(flat))[:3]
    flat[few] = torch.randn(len(few), dense.out_channels, dtype=x.dtype)
    g = flat.view(y.movedim(1, -1).shape).movedim(-1, 1)
    for found, exact in zip(gradients(ours, x, g), gradients(dense, x, g), strict=True):
        assert_close(found, exact)


@pytest.fixture(params=[1, 2, 3], ids="{}d".format)
def dims(request):
    return request.param


def layer_of(dims, config, groups=1, kernel=3, **kwargs):
    layer = OURS[dims](4, 6, kernel, padding=kernel // 2, groups=groups, **kwargs, config=config)
    return layer.double()


def inputs_of(dims):
    sizes = {1: (20,), 2: (5, 4), 3: (3, 2, 4)}[dims]
    scale = torch.linspace(0.2, 2, sizes[0], dtype=torch.float64).view(-1, *[1] * (dims - 1))
    return scale * (torch.randn(3, 4, *sizes, dtype=torch.float64) + 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("unbiased", "memory"), pairwise(UNBIASED, ["none", "input", "grad"]))
def test_the_mean_is_dense(unbiased, memory, mean_agrees):
    kept = None if memory == "none" else Subspace(rank=2, side=memory, refresh_every=2)
    layer = layer_of(2, MemAOPConfig(k=15, memory=kept, **unbiased))
    x = inputs_of(2)
    g = torch.randn_like(layer(x))
    for _ in range(3):  # the basis is of other rows, and was refreshed
        gradients(layer, x + torch.randn_like(x), g)
    before = copy.deepcopy(layer.memory)
    draws = []
    for _ in range(300):
        layer.layer_state.memory = copy.deepcopy(before)
        draws.append(gradients(layer, x, g)[0])
    layer.eval()
    mean_agrees(draws, gradients(layer, x, g)[0])
    assert torch.stack(draws).std(0).max() > 0


@pytest.mark.parametrize(
    ("groups", "kernel"),
    [(1, 3), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((2, 3), (1, 1), (2, 1)))],
)
def test_the_mean_is_dense_in_all_dimensions(dims, groups, kernel, mean_agrees):
    layer = layer_of(dims, MemAOPConfig(ratio=1 / 4), groups, kernel)
    x = inputs_of(dims)
    g = torch.randn_like(layer(x))
    draws = [gradients(layer, x, g)[0] for _ in range(300)]
    layer.eval()
    mean_agrees(draws, gradients(layer, x, g)[0])


@pytest.mark.parametrize("memory", ["none", "input", "grad"])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_order_in_memory_changes_nothing(memory, stride, mean_agrees):
    kept = None if memory == "none" else Subspace(rank=4, side=memory)
    layer = MemAOPConv2d(
        16, 24, 3, stride=stride, padding=1, config=MemAOPConfig(k=40, memory=kept)
    ).double()
    x = torch.randn(4, 16, 9, 8, dtype=torch.float64)
    g = torch.randn_like(layer(x))
    before = copy.deepcopy(layer.memory)
    found = []
    for order in (torch.channels_last, torch.contiguous_format):
        layer.layer_state.memory = copy.deepcopy(before)
        layer.to(memory_format=order)
        torch.manual_seed(5)
        both = (t.to(memory_format=order) for t in (x, g))
        found.append(gradients(layer, *both)[0].contiguous())
    assert_close(*found)
    draws = [gradients(layer, x, g)[0] for _ in range(200)]
    mean_agrees(draws, gradients(layer.eval(), x, g)[0])


def test_blocks_of_neighbours():
    layer = layer_of(2, MemAOPConfig(k=16, memory=None, block_rows=16, selection="topk"))
    x = inputs_of(2)
    g = torch.zeros_like(layer(x))
    g[1, :, 2] = 1  # rows 28 to 31 of 60
    found = gradients(layer, x, g)[0]
    assert_close(found, gradients(layer.eval(), x, g)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 2])
def test_other_dtypes_are_near_float64(dtype, groups):
    torch.manual_seed(1)
    exact = layer_of(2, MemAOPConfig(ratio=1 / 2, selection="topk", memory=None), groups)
    low = copy.deepcopy(exact).to(dtype)
    x = inputs_of(2)
    g = torch.randn_like(exact(x))
    found, expected = gradients(low, x.to(dtype), g.to(dtype)), gradients(exact, x, g)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        error = torch.linalg.vector_norm(a.double() - b) / torch.linalg.vector_norm(b)
        assert error < 20 * torch.finfo(dtype).eps


def test_conversion_keeps_the_object_and_its_parameters(dims):
    dense = list(CONVOLUTIONS)[dims - 1](4, 6, 3)
    model = nn.Sequential(dense)
    before, state = list(model.parameters()), copy.deepcopy(model.state_dict())
    assert convert_(model, MemAOPConfig())[0] is dense
    assert type(dense) is OURS[dims]
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert state.keys() == model.state_dict().keys()
    assert "ratio=0.125" in repr(dense)
    assert "kernel_size" in repr(dense)
    revert_(model)
    assert type(dense) is list(CONVOLUTIONS)[dims - 1]


def test_subclass_keeps_its_class():
    class Named(nn.Conv2d):
        pass

    model = nn.Sequential(Named(3, 4, 3))
    with pytest.warns(UserWarning, match="Named"), pytest.raises(ValueError, match="no layer"):
        convert_(model)
    convert_(model, MemAOPConfig(), filter_fn=lambda module, name: True)
    assert isinstance(model[0], Named)
    assert isinstance(model[0], MemAOPConv2d)
    twin = pickle.loads(pickle.dumps(convert_(nn.Sequential(nn.Conv2d(2, 2, 3)))))
    assert type(twin[0]) is MemAOPConv2d


def test_own_forward_is_refused():
    class Standardized(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight - weight.mean(), bias)

    model = nn.Sequential(Standardized(3, 4, 3))
    with pytest.raises(ValueError, match="forward pass of its own"):
        convert_(model, filter_fn=lambda module, name: True)


def test_targets():
    def model():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))

    every = convert_(model(), MemAOPConfig())
    assert [isinstance(m, MemAOPLayer) for m in every] == [True, False, True]
    linear = convert_(model(), MemAOPConfig(), targets="linear")
    assert type(linear[0]) is nn.Conv2d
    assert isinstance(linear[2], MemAOPLinear)
    with pytest.raises(ValueError, match="targets='convolutions'"):
        convert_(model(), MemAOPConfig(), targets="convolutions")


NOT_FOR_THEM = {
    "memory='residual'": {"selection": "topk", "memory": "residual"},
    "grad_input='sampled'": {"grad_input": "sampled"},
    "stash='int4'": {"stash": "int4"},
    "scores='grad'": {"scores": "grad", "memory": None},
}


@pytest.mark.parametrize("name", NOT_FOR_THEM)
def test_settings_that_are_not_for_convolutions(name):
    config = MemAOPConfig(**NOT_FOR_THEM[name])
    with pytest.raises(ValueError, match=name):
        MemAOPConv2d(3, 4, 3, config=config)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=rf"{name} is not for convolutions: '0'"):
        convert_(model, config)
    assert type(model[0]) is nn.Conv2d
    dense = nn.Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match=name):
        adopt_(dense, config)
    assert type(dense) is nn.Conv2d
    with pytest.raises(ValueError, match=rf"layer '0': {name}"):
        convert_(nn.Sequential(nn.Conv2d(3, 4, 3)), overrides={"0": config})


def test_depthwise_stays_dense():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 16, 1))
    convert_(model, MemAOPConfig())
    assert type(model[0]) is nn.Conv2d
    assert coverage(model).left["Conv2d"].reason == "a depthwise convolution"
    with pytest.raises(ValueError, match="depthwise"):
        MemAOPConv2d(4, 8, 3, groups=4)


def test_groups_have_no_subspace():
    layer = MemAOPConv2d(4, 8, 3, groups=2)
    assert layer.memory is None
    assert layer.config.memory is None
    model = convert_(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), MemAOPConfig())
    gradients(model, torch.randn(8, 4, 9, 9))
    assert model[0].config.memory is None


def test_inputs_without_a_batch_and_without_a_bias(dims):
    layer = layer_of(dims, MemAOPConfig(ratio=1), bias=False)
    x = inputs_of(dims)
    alone, batched = gradients(layer, x[0]), gradients(layer, x[:1])
    assert_close(alone[0], batched[0])
    assert alone[1].shape == x[0].shape


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("padding", [0, "same"])
def test_sizes_that_are_changed_after_construction(dims, padding):
    """As by what turns strides of a trained network into dilations."""
    dense = list(CONVOLUTIONS)[dims - 1](2, 3, 3, padding=padding, dtype=torch.float64)
    ours = OURS[dims].from_conv(dense, MemAOPConfig(k=10_000, memory=None))
    x = torch.randn(2, 2, *[9] * dims, dtype=torch.float64)
    for layer in (dense, ours):
        layer.dilation = (2,) * dims
        if padding == 0:
            layer.padding, layer.stride = 2, [2] * dims
        layer.weight = nn.Parameter(torch.ones(3, 2, *[2] * dims, dtype=torch.float64))
    assert torch.equal(ours(x), dense(x))
    g = torch.randn_like(dense(x))
    for found, exact in zip(gradients(ours, x, g), gradients(dense, x, g), strict=True):
        assert_close(found, exact)


def test_what_the_dense_layer_refuses(dims):
    dense = list(CONVOLUTIONS)[dims - 1](1, 2, 3)
    ours = OURS[dims].from_conv(dense, MemAOPConfig())
    for sizes in ([5] * dims, [1, 1, 1, *[5] * dims], [2, 1, *[2] * dims], [2, 3, *[5] * dims]):
        x = torch.randn(sizes)
        with pytest.raises(RuntimeError) as of_dense:
            dense(x)
        with pytest.raises(RuntimeError) as of_ours:
            ours(x)
        assert str(of_ours.value) == str(of_dense.value)


def test_complex_inputs_are_refused():
    layer = MemAOPConv2d(3, 4, 3, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"floating-point dtype, got torch\.complex64"):
        layer(torch.randn(2, 3, 8, 8, dtype=torch.complex64))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_rows_drawn(groups, dtype):
    config = MemAOPConfig(k=1, selection="bernoulli", memory=None)
    layer = MemAOPConv2d(4, 6, 3, groups=groups, dtype=dtype, config=config)
    x = torch.randn(2, 4, 8, 8, dtype=dtype)
    drawn = [gradients(layer, x)[0].count_nonzero().item() for _ in range(30)]
    # Of 72 rows one is drawn in the mean, and none more than once in three.
    assert min(drawn) == 0
    assert max(drawn) > 0


def test_an_empty_batch():
    layer = MemAOPConv2d(3, 4, 3)
    dw, db, dx = gradients(layer, torch.randn(0, 3, 8, 8))
    assert torch.equal(dw, torch.zeros_like(layer.weight))
    assert torch.equal(db, torch.zeros(4))
    assert dx.shape == (0, 3, 8, 8)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("memory", ["none", "subspace"])
def test_a_gradient_that_is_not_finite_reaches_the_weight(value, memory):
    layer = MemAOPConv2d(3, 4, 3, config=MemAOPConfig(k=4, memory=memory))
    x = torch.randn(2, 3, 8, 8)
    g = torch.randn_like(layer(x))
    gradients(layer, x, g)
    g[1, 2, 3, 3] = value
    assert not gradients(layer, x, g)[0].isfinite().all()


def test_frozen_parts():
    layer = MemAOPConv2d(3, 4, 3)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    layer.weight.requires_grad_(False)
    y = layer(x)
    dx, db = torch.autograd.grad(y.sum(), [x, layer.bias])
    dense = nn.functional.conv2d(x, layer.weight, layer.bias)
    expected = torch.autograd.grad(dense.sum(), [x, layer.bias])
    assert_close((dx, db), tuple(expected))
    layer.weight.requires_grad_()
    (only_x,) = torch.autograd.grad(layer(x).sum(), [x])
    assert_close(only_x, dx)
    assert layer.memory.step == 0  # nobody asked for dW


def test_second_derivatives_and_batched_gradients_are_refused():
    layer = MemAOPConv2d(3, 4, 3)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    (dw,) = torch.autograd.grad(layer(x).square().sum(), [layer.weight], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        dw.sum().backward()
    y = layer(x)
    with pytest.raises(RuntimeError, match="cannot be batched"):
        torch.autograd.grad(y, [x], torch.ones(2, *y.shape), is_grads_batched=True)


def test_evaluation_is_dense_and_without_gradients_nothing_is_kept():
    dense = nn.Conv2d(3, 4, 3)
    layer = MemAOPConv2d.from_conv(dense, MemAOPConfig(k=1, memory=None))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert layer(x).grad_fn is None
    layer.eval()
    for found, exact in zip(gradients(layer, x), gradients(dense, x), strict=True):
        assert torch.equal(found, exact)
