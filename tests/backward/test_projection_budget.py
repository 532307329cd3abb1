"""What a projected dX costs, and what a budget buys of it."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from memaop_triton import MemAOPConfig, MemAOPLinear, Projected, Subspace, new_memory
from memaop_triton.backward.input_grad import flops_of_input_grad
from memaop_triton.flops import projected_input_grad_flops, projection_rank_within
from tests.schemes import flat_config

M, N, P = 512, 64, 96
DENSE = 2 * M * N * P


def layer_of(dtype=torch.float32, **settings):
    config = flat_config(**{"grad_input": "projected"} | settings)
    return MemAOPLinear(N, P, config=config, dtype=dtype)


def input_grad(layer, g):
    x = torch.randn(len(g), N, dtype=g.dtype, requires_grad=True)
    layer(x).backward(g)
    return x.grad


@pytest.mark.parametrize("budget", [1 / 16, 1 / 4, 1 / 2])
def test_both_halves_stay_within_their_budgets(budget):
    layer = layer_of(budget=budget)
    x = torch.randn(M, N, requires_grad=True)
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            y = layer(x)
        with FlopCounterMode(display=False) as backward:
            y.backward(torch.randn(M, P))
    assert counter.get_total_flops() == DENSE
    assert 0.8 * 2 * budget * DENSE < backward.get_total_flops() <= 2 * budget * DENSE


def test_the_rank_is_the_largest_that_the_budget_pays_for():
    for budget in (0.04, 0.1, 0.3, 0.7, 0.999):
        rank = projection_rank_within(budget, M, N, P, 8)
        assert projected_input_grad_flops(M, N, P, rank, 8) <= budget * DENSE
        assert projected_input_grad_flops(M, N, P, rank + 4, 8) > budget * DENSE or rank == N
    assert projection_rank_within(1e-6, M, N, P, 8) == 1
    assert projection_rank_within(0.9, 10**6, 6, 10**4, 8) == 4


def test_flops_are_those_of_the_three_products_and_the_refreshes():
    config = MemAOPConfig(memory=Subspace(rank=4, refresh_every=10), grad_input="projected")
    memory = new_memory(config, N, P)
    # A power iteration on all of the 512 rows and W, and QR.
    refresh = 2 * 4 * P * (M + N) + 4 * 4 * 4 * N
    expected = 2 * 4 * (M * P + P * N + M * N) + refresh / 10
    assert flops_of_input_grad(config, memory, M, N, P) == round(expected)
    assert flops_of_input_grad(config, memory, 2, N, P) == 2 * 2 * N * P  # dense


def test_a_budget_of_its_own():
    given = MemAOPConfig(budget=1 / 8, grad_input=Projected(1 / 2))
    shared = MemAOPConfig(budget=1 / 8, grad_input="projected")
    ranks = [config.projection_rank(M, N, P) for config in (given, shared)]
    assert ranks[0] > 3 * ranks[1]
    with_ratio = MemAOPConfig(ratio=1 / 8, grad_input=Projected(1 / 2))
    assert with_ratio.projection_rank(M, N, P) == ranks[0]
    for config in (
        MemAOPConfig(memory=Subspace(rank=9)),
        MemAOPConfig(budget=1 / 2, memory=Subspace(rank=9)),
    ):
        config = dataclasses.replace(config, grad_input="projected")
        assert config.projection_rank(M, N, P) == 9
    assert MemAOPConfig(grad_input="projected").projection_rank(M, 40, P) == 10  # a quarter


def test_another_budget_of_dw_leaves_dx_as_it_is():
    for settings in ({"budget": 1 / 4}, {"ratio": 1 / 4, "rank": 6}):
        layer = layer_of(**settings)
        rank = layer.config.projection_rank(M, N, P)
        input_grad(layer, torch.randn(M, P))
        q = layer.memory.projection.basis.clone()
        for change, share in ((layer.set_budget_, 1 / 64), (layer.set_ratio_, 1 / 2)):
            change(share)
            assert layer.config.projection_rank(M, N, P) == rank
            input_grad(layer, torch.randn(M, P))
            assert torch.equal(layer.memory.projection.basis, q)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": "none"}, "needs memory='subspace'.*not 'none'"),
        ({"selection": "topk", "memory": "residual"}, "needs memory='subspace'.*not 'residual'"),
        ({"grad_input_budget": 1.0}, "budget=1 is what dense costs: use grad_input='exact'"),
        ({"grad_input_budget": 1.5}, r"budget=1\.5 must be in \(0, 1\]"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        flat_config(**{"grad_input": "projected"} | settings)
    with pytest.raises(TypeError, match="budget must be a number"):
        MemAOPConfig(grad_input=Projected("all"))
