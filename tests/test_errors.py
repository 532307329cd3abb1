import re

import pytest
import torch
from torch import nn

from memaop_triton import MemAOPConfig, MemAOPLinear, ResidualMemory, SubspaceMemory, memaop_linear
from memaop_triton.backward.weight_grad import weight_grad

PLAIN = MemAOPConfig(k=2, memory="none")
PAPER = MemAOPConfig.paper()
CONVERTED = MemAOPLinear(12, 5, config=PLAIN)
X, WEIGHT, G = torch.ones(3, 12), torch.ones(5, 12), torch.ones(3, 5)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_integer_input_of_a_layer(dtype, autocast):
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(TypeError, match=rf"x must be of a floating-point dtype, got {dtype}.*x\.to"),
    ):
        CONVERTED(X.to(dtype))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: memaop_linear(X[:, 1:], WEIGHT, None, PLAIN), ValueError, "x has shape (3, 11)"),
        (lambda: memaop_linear(X[0, 0], WEIGHT, None, PLAIN), ValueError, "x has shape (), but"),
        (lambda: memaop_linear(X, WEIGHT[0], None, PLAIN), ValueError, "must be [out_features, in"),
        (lambda: memaop_linear(X, WEIGHT, X[0], PLAIN), ValueError, "bias has shape (12,), weight"),
        (lambda: memaop_linear(X.double(), WEIGHT, None, PLAIN), TypeError, "x is torch.float64"),
        (lambda: weight_grad(X, G[1:], PLAIN), ValueError, "got (3, 12) and (2, 5)"),
        (lambda: weight_grad(X[None], G, PLAIN), ValueError, "(1, 3, 12) and (3, 5): flatten"),
        (lambda: weight_grad(X.long(), G, PLAIN), TypeError, "must be of a floating-point dtype"),
        (lambda: weight_grad(X, G.double(), PLAIN), TypeError, "g is torch.float64 but x is"),
        (lambda: SubspaceMemory(12, 2, refresh_every=0), ValueError, "refresh_every=0 must be at"),
        (lambda: SubspaceMemory(12, 9, 0, side="input"), ValueError, "rank=0 does not fit"),
        (lambda: SubspaceMemory(12, 9, 13, side="input"), ValueError, "in_features=12"),
        (lambda: SubspaceMemory(12, 9, 10, side="grad"), ValueError, "out_features=9"),
        (lambda: SubspaceMemory(12, 9, 10, side="auto"), ValueError, "out_features=9"),
        (lambda: MemAOPLinear.adopt_(nn.Linear(12, 5), "k"), TypeError, "MemAOPConfig, got 'k'"),
        (lambda: MemAOPLinear(12, 5, config="k=3"), TypeError, "must be a MemAOPConfig, got 'k=3'"),
        (lambda: memaop_linear(X, WEIGHT, None, {"k": 3}), TypeError, "MemAOPConfig, got {'k': 3}"),
        (lambda: MemAOPLinear.from_linear(nn.Conv1d(1, 1, 1)), TypeError, "nn.Linear, got Conv1d"),
        (lambda: MemAOPLinear.from_linear(CONVERTED), ValueError, "converted already: revert_"),
    ],
)
def test_argument_that_does_not_fit(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("config", "memory", "message"),
    [
        (MemAOPConfig(), None, "memory is of kind 'none', but config.memory='subspace'"),
        (PLAIN, ResidualMemory(12, 5), "of kind 'residual', but .*='none'"),
        (PAPER, SubspaceMemory(12, 8, 2), "of kind 'subspace', but .*='residual'"),
        (PAPER, ResidualMemory(12, 5, signed=True), "of kind 'signed', but"),
        (PAPER, ResidualMemory(11, 5), "rows of 11 inputs, but x has rows of 12"),
        (MemAOPConfig(), SubspaceMemory(11, 8, 2), "rows of 11 inputs, but x has rows of 12"),
        (PAPER, ResidualMemory(12, 4), "4 outputs"),
    ],
)
@pytest.mark.parametrize("outputs", [5, 1])
def test_memory_that_does_not_fit(config, memory, message, outputs):
    with pytest.raises(ValueError, match=message):
        weight_grad(torch.ones(30, 12), torch.ones(30, outputs), config, memory)
    with pytest.raises(ValueError, match=message):
        memaop_linear(torch.ones(30, 12), torch.ones(outputs, 12), None, config, memory)
