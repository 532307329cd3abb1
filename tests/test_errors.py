import re

import pytest
import torch
from torch import nn

from memaop_triton import (
    MemAOPConfig,
    MemAOPLinear,
    ResidualMemory,
    SubspaceMemory,
    memaop_linear,
    new_memory,
)
from memaop_triton.backward.weight_grad import weight_grad

PLAIN = MemAOPConfig(k=2, memory="none")
WEIGHT = torch.ones(5, 12)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_integer_input_of_a_layer(dtype, autocast):
    layer = MemAOPLinear(12, 5, config=PLAIN)
    x = torch.ones(3, 12, dtype=dtype)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(TypeError, match=rf"x must be of a floating-point dtype, got {dtype}.*x\.to"),
    ):
        layer(x)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "error", "message"),
    [
        (torch.ones(3, 11), WEIGHT, None, ValueError, "x has shape (3, 11), but weight (5, 12)"),
        (torch.tensor(1.0), WEIGHT, None, ValueError, "x has shape (), but weight (5, 12)"),
        (torch.ones(3, 12), WEIGHT[0], None, ValueError, "weight must be [out_features, in_feat"),
        (torch.ones(3, 12), WEIGHT, torch.ones(4), ValueError, "bias has shape (4,), weight needs"),
        (torch.ones(3, 12).double(), WEIGHT, None, TypeError, "x is torch.float64 but weight is"),
    ],
)
def test_operands_of_a_layer_that_do_not_fit(x, weight, bias, error, message):
    with pytest.raises(error, match=re.escape(message)):
        memaop_linear(x, weight, bias, PLAIN)


@pytest.mark.parametrize(
    ("x", "g", "error", "message"),
    [
        ((3, 12), (4, 5), ValueError, "x must be [M, N] and g [M, P], got (3, 12) and (4, 5)"),
        ((2, 3, 12), (6, 5), ValueError, "got (2, 3, 12) and (6, 5): flatten the leading"),
    ],
)
def test_operands_of_weight_grad_that_do_not_fit(x, g, error, message):
    with pytest.raises(error, match=re.escape(message)):
        weight_grad(torch.ones(x), torch.ones(g), PLAIN)


def test_operands_of_weight_grad_of_a_wrong_dtype():
    with pytest.raises(TypeError, match=r"x must be of a floating-point dtype, got torch\.int64"):
        weight_grad(torch.ones(3, 12).long(), torch.ones(3, 5), PLAIN)
    with pytest.raises(TypeError, match=r"g is torch\.float64 but x is torch\.float32"):
        weight_grad(torch.ones(3, 12), torch.ones(3, 5).double(), PLAIN)


@pytest.mark.parametrize(
    ("config", "memory", "message"),
    [
        (MemAOPConfig(), None, "memory is of kind 'none', but config.memory='subspace'"),
        (PLAIN, ResidualMemory(12, 5), "of kind 'residual', but .*='none'"),
        (
            MemAOPConfig.paper(),
            SubspaceMemory(12, 8, 2),
            "of kind 'subspace', but .*='residual'",
        ),
        (MemAOPConfig.paper(), ResidualMemory(12, 5, signed=True), "of kind 'signed', but"),
        (MemAOPConfig.paper(), ResidualMemory(11, 5), "rows of 11 inputs, but x has rows of 12"),
        (MemAOPConfig(), SubspaceMemory(11, 8, 2), "rows of 11 inputs, but x has rows of 12"),
        (MemAOPConfig.paper(), ResidualMemory(12, 4), "4 outputs"),
    ],
)
@pytest.mark.parametrize("outputs", [5, 1])
def test_memory_that_does_not_fit(config, memory, message, outputs):
    with pytest.raises(ValueError, match=message):
        weight_grad(torch.ones(30, 12), torch.ones(30, outputs), config, memory)
    with pytest.raises(ValueError, match=message):
        memaop_linear(torch.ones(30, 12), torch.ones(outputs, 12), None, config, memory)


@pytest.mark.parametrize(
    ("rank", "side", "named"),
    [
        (0, "input", "in_features=12"),
        (-1, "grad", "out_features=9"),
        (13, "input", "in_features=12"),
        (10, "grad", "out_features=9"),
        (10, "auto", "out_features=9"),
    ],
)
def test_rank_that_does_not_fit(rank, side, named):
    with pytest.raises(ValueError, match=f"rank={rank} does not fit.*{named}.*1 to"):
        SubspaceMemory(12, 9, rank, side=side)


def test_refresh_interval_of_a_memory():
    with pytest.raises(ValueError, match="refresh_every=0 must be at least 1"):
        SubspaceMemory(12, 2, refresh_every=0)


@pytest.mark.parametrize("config", ["priority", {"k": 3}, 3])
def test_configuration_of_a_wrong_type(config):
    message = re.escape(f"config must be a MemAOPConfig, got {config!r}")
    with pytest.raises(TypeError, match=message):
        MemAOPLinear(12, 5, config=config)
    with pytest.raises(TypeError, match=message):
        memaop_linear(torch.ones(3, 12), WEIGHT, None, config)


def test_from_linear_of_something_else():
    with pytest.raises(TypeError, match=r"linear must be an nn\.Linear, got Conv1d"):
        MemAOPLinear.from_linear(nn.Conv1d(1, 1, 1))
    layer = MemAOPLinear(12, 5)
    with pytest.raises(ValueError, match="MemAOPLinear is converted already: revert_"):
        MemAOPLinear.from_linear(layer)


def test_backward_with_a_memory_that_was_made_for_another_layer_is_found_in_forward():
    memory = new_memory(MemAOPConfig.paper(), 11, 5)
    with pytest.raises(ValueError, match="rows of 11 inputs"):
        memaop_linear(torch.ones(3, 12), WEIGHT, None, MemAOPConfig.paper(), memory)
