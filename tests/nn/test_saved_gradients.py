"""Gradients from tensors that were saved in 8 bits: near the exact ones, and unbiased."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memaop_triton import compress_saved
from tests.nn.saving import MODELS, ROWS, SIZE, gradients, made, rows


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_near_those_of_exact_tensors_and_unbiased(name):
    model, batch = MODELS[name]()
    exact = gradients(model, batch())
    compress_saved(model)
    errors = torch.stack([gradients(model, batch()) - exact for _ in range(24)])
    one = errors.square().sum(1).mean() / exact.square().sum()
    mean = errors.mean(0).square().sum() / exact.square().sum()
    # The largest of 64 normal numbers is 2.7 in the mean: 2.7 / 127 / √12 = 0.0061 for a product
    # with rounded inputs. What has gone through other operations adds less than as much again.
    assert 0.005 < one.sqrt() < 0.0061 * math.sqrt(2)
    assert mean * len(errors) < 1.2 * one  # a bias would stay


class Between(nn.Module):
    """What another operation makes of x, multiplied with a matrix."""

    def __init__(self, function, width=SIZE):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.linear = nn.Linear(width, 48)

    def forward(self, x):
        return self.linear(self.function(x))


LINEAR_IN_WHAT_IS_SAVED = {
    "layer norm": (lambda: nn.LayerNorm(SIZE), (ROWS, SIZE)),
    "group norm": (lambda: nn.GroupNorm(4, 32), (8, 32, 16, 16)),
    "batch norm": (lambda: nn.BatchNorm2d(32), (8, 32, 16, 16)),
    "RMS norm": (lambda: nn.RMSNorm(SIZE), (ROWS, SIZE)),
    "linear": (lambda: nn.Linear(SIZE, 48), (ROWS, SIZE)),
    "linear without bias": (lambda: nn.Linear(SIZE, 48, bias=False), (4, 64, SIZE)),
    "convolution": (lambda: nn.Conv2d(32, 8, 3), (8, 32, 16, 16)),
    "after a GELU": (lambda: Between(F.gelu), (ROWS, SIZE)),
    "after a SwiGLU": (lambda: Between(lambda x: F.silu(x) * x), (ROWS, SIZE)),
    "after a softmax": (lambda: Between(lambda x: (3 * x).softmax(-1)), (ROWS, SIZE)),
}


@pytest.mark.parametrize("name", LINEAR_IN_WHAT_IS_SAVED)
def test_gradients_of_weights_are_unbiased(name):
    make, shape = LINEAR_IN_WHAT_IS_SAVED[name]
    torch.manual_seed(0)
    model, x = make(), rows(*shape)
    exact = gradients(model, made(x))
    compress_saved(model)
    errors = torch.stack([gradients(model, made(x)) - exact for _ in range(200)]).double()
    deviation = errors.std(0)
    noisy = deviation > 1e-5 * exact.abs().max()  # the others are of biases, and exact
    assert noisy.sum() >= SIZE // 4
    standard = errors.mean(0)[noisy] / (deviation[noisy] / math.sqrt(len(errors)))
    assert standard.abs().max() < 4 + 0.5 * (noisy.sum() > 1000)
    assert standard.square().mean() < 1 + 5 * math.sqrt(2 / noisy.sum())


@pytest.mark.parametrize("function", [F.gelu, F.silu, F.mish, F.glu, torch.tanh, torch.sigmoid])
def test_gradients_through_smooth_functions(function):
    x, g = rows(), rows(seed=2)
    module = Between(function, SIZE // 2 if function is F.glu else SIZE)
    found = {}
    for is_exact in (True, False):
        compressed = compress_saved(module)
        if is_exact:
            compressed.remove()
        leaf = x.clone().requires_grad_()
        module(leaf * 1).backward(g[:, :48])
        found[is_exact] = leaf.grad
    error = (found[True] - found[False]).norm() / found[True].norm()
    assert compressed.exact_bytes > 0
    assert 1e-4 < error < 0.02


SIGNS = {
    "ReLU": F.relu,
    "ReLU in place": lambda x: F.relu_(x + 0),
    "leaky": F.leaky_relu,
    "leaky, in place": lambda x: F.leaky_relu_(x + 0, 0.1),
}


@pytest.mark.parametrize("name", SIGNS)
def test_a_relu_needs_signs_and_its_gradient_is_exact(name):
    module, x = Between(SIGNS[name]), rows()
    grads = []
    for is_compressed in (False, True):
        if is_compressed:
            compressed = compress_saved(module)
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        module(leaf * 1).backward(rows(seed=2)[:, :48])
        grads.append((leaf.grad, module.linear.weight.grad))
    (dx, dw), (our_dx, our_dw) = grads
    assert torch.equal(dx, our_dx)
    assert 0.001 < (our_dw - dw).norm() / dw.norm() < 0.02
    tensors = 2 if name == "leaky" else 1  # one saves its argument, the others their result
    assert compressed.exact_bytes == tensors * x.nbytes
    signs = x.numel() // 8
    assert compressed.held_bytes == x.numel() // 512 * (512 + 16 + 4) + 8 + signs


NOT_FOR_ROUNDING = {
    "ReLU6": F.relu6,
    "largest": lambda x: x - x.amax(-1, keepdim=True),
    "sum of exponentials": lambda x: x - x.logsumexp(-1, keepdim=True),
    "log softmax": lambda x: x.log_softmax(-1),
    "logarithm": lambda x: x.square().add(0.1).log(),
    "square root": lambda x: x.square().add(0.1).sqrt(),
    "power": lambda x: x.square().add(0.1) ** 1.5,
    "quotient": lambda x: 1 / (x.square() + 0.1),
}


@pytest.mark.parametrize("name", NOT_FOR_ROUNDING)
def test_what_other_operations_save_stays_as_it_is(name):
    """So does what their result is multiplied with, where that is held in any case."""
    module, x = Between(NOT_FOR_ROUNDING[name]), rows()
    grads = []
    for is_compressed in (False, True):
        if is_compressed:
            compressed = compress_saved(module)
        leaf = x.clone().requires_grad_()
        module(leaf * 1).backward(rows(seed=2)[:, :48])
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    keeps_its_result = name in ("log softmax", "square root")
    assert compressed.exact_bytes == (0 if keeps_its_result else x.nbytes)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_numbers_that_are_not_finite_reach_the_gradient(value):
    """So that a GradScaler skips the step."""
    model, x = nn.Sequential(nn.LayerNorm(SIZE), nn.Linear(SIZE, 8)), rows()
    x[3, 4] = value
    compress_saved(model)
    gradients(model, made(x))
    assert not model[1].weight.grad.isfinite().any()
