"""The FLOPs of a weight gradient, and the rows and ranks that fit a budget."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from memaop_triton import MemAOPConfig, convert_
from memaop_triton.flops import (
    MAX_RANK,
    SubspaceCost,
    rank_within,
    refresh_stride,
    rows_within,
    weight_grad_flops,
)

SHAPES = [(256, 784, 256), (2048, 512, 2048), (2048, 2048, 512), (128, 128, 128), (4096, 64, 96)]
BUDGETS = [1 / 2, 1 / 4, 1 / 8]


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("side", ["input", "grad"])
def test_the_subspace_costs_what_its_products_cost(side):
    m, n, p, k, q = 200, 24, 40, 20, 3
    a, b = torch.randn(m, n), torch.randn(m, p)
    if side == "grad":
        a, b = b, a
    basis = torch.linalg.qr(torch.randn(a.shape[1], q)).Q

    def step():
        z = a @ basis
        zb = z.t() @ b
        rest = a[:k] - z[:k] @ basis.t()
        b[:k].t() @ rest
        zb.t() @ basis.t()

    refresh = counted(lambda: a.t() @ (a @ basis)) / 2 + 4 * q * q * a.shape[1]
    norms = 2 * m * (n + p)
    subspace = SubspaceCost(q, a.shape[1], 5, 0)
    cost = weight_grad_flops(m, n, p, k, subspace)
    assert cost == counted(step) + norms + round(refresh / 5)
    looked_at = weight_grad_flops(m, n, p, k, subspace._replace(kept=q * (n + p)))
    projected = counted(lambda: (a @ torch.randn(a.shape[1], q), b @ torch.randn(b.shape[1], q)))
    assert abs(looked_at - cost - (3 * projected + 4 * q * q * (n + p)) / 20) <= 1


@pytest.mark.parametrize(
    ("m", "rank", "read"), [(1023, 16, 1023), (2048, 16, 683), (8192, 16, 911), (8192, 256, 2731)]
)
def test_a_refresh_reads_some_of_many_rows(m, rank, read):
    assert len(range(m)[:: refresh_stride(m, rank)]) == read
    n, p = 64, 96
    cost = [weight_grad_flops(m, n, p, 8, SubspaceCost(rank, n, every, 0)) for every in (1, 10**9)]
    assert cost[0] - cost[1] == (2 * read + 4 * rank) * rank * n
    looked = [
        weight_grad_flops(m, n, p, 8, SubspaceCost(rank, n, 10**9, kept)) for kept in (0, 10**9)
    ]
    assert abs(looked[1] - looked[0] - (6 * read + 4 * rank) / 4) <= 1


@pytest.mark.parametrize("length", [16, 64, 128, 256])
def test_all_places_of_a_sequence_are_read(length):
    rows = torch.arange(128 * length) % length
    counts = rows[:: refresh_stride(rows.numel(), 16)].bincount(minlength=length)
    assert counts.min() >= counts.max() - 1 > 0


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("m", "n", "p"), SHAPES)
@pytest.mark.parametrize("rank", [0, 4, 8])
def test_a_budget_buys_the_most_rows_that_fit(budget, m, n, p, rank):
    subspace = SubspaceCost(rank, n, 8, rank * (n + p)) if rank else None
    k = int(rows_within(budget, m, n, p, subspace))
    if k < 0:
        assert rank_within(budget, m, n, p, 8, both_sides=True) < rank
        return
    assert weight_grad_flops(m, n, p, k, subspace) <= budget * 2 * m * n * p
    assert weight_grad_flops(m, n, p, k + 1, subspace) > budget * 2 * m * n * p


def test_rank_leaves_four_tenths_of_a_budget_for_rows():
    m, n, p, budget = 2048, 512, 2048, 1 / 8
    rank = rank_within(budget, m, n, p, 8, both_sides=True)
    for more, is_within in ((0, True), (4, False)):
        subspace = SubspaceCost(rank + more, p, 8, (rank + more) * (n + p))
        left = rows_within(budget, m, n, p, subspace) / rows_within(budget, m, n, p)
        assert (left > 0.4) == is_within
    assert rank_within(1 / 2, 10**6, 8192, 8192, 8, both_sides=True) == MAX_RANK
    assert rank_within(1e-3, 64, 64, 64, 8, both_sides=True) == 0


@pytest.mark.parametrize("memory", ["none", "subspace"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("m", "n", "p"), SHAPES)
def test_a_layer_stays_within_its_budget(memory, budget, m, n, p):
    config = MemAOPConfig(budget=budget, memory=memory)
    layer = convert_(nn.Linear(n, p, bias=False), config)
    x = torch.randn(m, n)
    layer(x).sum().backward()
    spent = counted(lambda: layer(x).sum().backward()) - 2 * m * n * p
    assert 0.8 * budget < spent / (2 * m * n * p) <= budget


def test_a_budget_below_one_row_still_computes_one():
    config = MemAOPConfig(budget=1e-4, memory="none")
    assert config.num_rows(64, 8, 8) == 1
    assert MemAOPConfig(budget=1e-4, memory="none", block_rows=16).num_rows(64, 8, 8) == 16
