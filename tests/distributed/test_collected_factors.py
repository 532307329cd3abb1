"""What `FactorAllGather` collects of a layer: factors that are not those of its dW are not sent."""

import pytest
import torch

from memaop_triton import MemAOPLinear
from memaop_triton.backward.step import Factors
from memaop_triton.distributed.collected_factors import CollectedFactors
from tests.schemes import LEGAL, flat_config, label

P, N, M = 96, 64, 128


def collected(layer, steps=2, spoil=lambda factors: factors):
    found = CollectedFactors(layer.weight, 1)
    found.max_bytes = float("inf")
    layer.layer_state.factors = found.factors
    layer.layer_state.on_weight_grad = lambda dw: (
        found.factors.append(spoil(found.factors.pop())),
        found.add(dw),
    )
    for _ in range(steps):
        layer(torch.randn(M, N, dtype=layer.weight.dtype)).square().sum().backward()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", LEGAL, ids=label)
def test_factors_of_a_gradient_are_sent(scheme, dtype):
    layer = MemAOPLinear(N, P, config=flat_config(ratio=1 / 8, rank=4, **scheme), dtype=dtype)
    found = collected(layer, steps=1 if dtype == torch.bfloat16 else 2)
    assert found.header(layer.weight.grad)[0] > 0


def test_factors_of_another_gradient_are_not():
    layer = MemAOPLinear(N, P, config=flat_config(ratio=1 / 8))
    stale = collected(layer, spoil=lambda f: Factors(f.x, 0.9 * f.g))
    assert stale.header(layer.weight.grad)[0] == -1
    layer.zero_grad()
    assert collected(layer).header(layer.weight.grad)[0] > 0


LOW_RANK = {
    "one row": {"k": 1},
    "a mean": {"ratio": 1 / 8, "shift": 8.0},
    "small": {"ratio": 1 / 8, "scale": 1e-3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", LOW_RANK.values(), ids=LOW_RANK.keys())
def test_no_direction_of_a_gradient_raises_a_false_alarm(case, dtype):
    """The rounding of dW is relative to all of it, of which the probe may meet little."""
    case = dict(case)
    shift, scale = case.pop("shift", 0.0), case.pop("scale", 1.0)
    layer = MemAOPLinear(N, P, config=flat_config(memory="none", **case), dtype=dtype)
    for _ in range(60):
        found = CollectedFactors(layer.weight, 1)
        found.max_bytes = float("inf")
        layer.layer_state.factors, layer.layer_state.on_weight_grad = found.factors, found.add
        layer.zero_grad()
        x = (torch.randn(M, N) + shift).mul(scale).to(dtype)
        layer(x).backward(torch.randn(M, P).mul(scale).to(dtype))
        assert found.header(layer.weight.grad)[0] > 0
