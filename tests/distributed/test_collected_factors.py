"""What `FactorAllGather` collects of a layer: factors that are not those of its dW are not sent."""

import pytest
import torch

from memaop_triton import MemAOPLinear
from memaop_triton.backward.step import Factors
from memaop_triton.distributed.collected_factors import CollectedFactors
from tests.schemes import LEGAL, flat_config, label

P, N, M = 96, 64, 128


def are_sent(layer, *passes, spoil=lambda factors: factors):
    """Whether the factors of these passes, rows and gradients of rows, stand for dW."""
    found = CollectedFactors(layer.weight, 1)
    found.max_bytes = float("inf")

    def add(dw):
        found.factors.append(spoil(found.factors.pop()))
        found.add(dw)

    layer.layer_state.factors, layer.layer_state.on_weight_grad = found.factors, add
    layer.zero_grad()
    for x, g in passes:
        layer(x.to(layer.weight.dtype)).backward(g.to(layer.weight.dtype))
    return found.header(layer.weight.grad)[0] > 0


def batch():
    return torch.randn(M, N), torch.randn(M, P)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", LEGAL, ids=label)
def test_factors_of_a_gradient_are_sent(scheme, dtype):
    layer = MemAOPLinear(N, P, config=flat_config(ratio=1 / 8, rank=4, **scheme), dtype=dtype)
    assert are_sent(layer, batch())
    assert dtype == torch.bfloat16 or are_sent(layer, batch(), batch())


def test_factors_of_another_gradient_are_not():
    layer = MemAOPLinear(N, P, config=flat_config(ratio=1 / 8))
    assert not are_sent(layer, batch(), spoil=lambda f: Factors(f.x, 0.9 * f.g))
    assert are_sent(layer, batch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "shift", "scale"),
    [({"k": 1}, 0.0, 1.0), ({"ratio": 1 / 8}, 8.0, 1.0), ({"ratio": 1 / 8}, 0.0, 1e-3)],
    ids=["one row", "a mean", "small"],
)
def test_no_direction_of_a_gradient_raises_a_false_alarm(rows, shift, scale, dtype):
    """The rounding of dW is relative to all of it, of which the probe may meet little."""
    layer = MemAOPLinear(N, P, config=flat_config(memory="none", **rows), dtype=dtype)
    for _ in range(60):
        x, g = batch()
        assert are_sent(layer, ((x + shift) * scale, g * scale))
