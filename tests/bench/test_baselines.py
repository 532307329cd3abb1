"""The methods of the literature that the benchmarks compare with: their laws and their sums."""

import math

import pytest
import torch

from memaop_triton import MemAOPConfig, Rows, new_memory
from memaop_triton.backward.weight_grad import weight_grad
from memaop_triton.bench.report.methods import BASELINES
from memaop_triton.bench.suites import baselines
from memaop_triton.reference import weight_grad_reference
from memaop_triton.sampling.selection import select_rows

M, N, P, K = 40, 12, 5, 10
NAMES = ["authors", *baselines.STATELESS]


@pytest.fixture
def batch():
    """X and G with some rows much larger than others."""
    scale = torch.logspace(-1, 1, M, dtype=torch.float64)[torch.randperm(M)].unsqueeze(1)
    x = scale * (torch.randn(M, N, dtype=torch.float64) + 0.5)
    return x, scale * torch.randn(M, P, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_mean_over_draws_is_dense_or_the_rows_are_those_of_topk(name, batch, mean_agrees):
    x, g = batch
    call = baselines.make(name, K)
    if BASELINES[name].unbiased:
        mean_agrees([call(x, g) for _ in range(500)], g.T @ x)
    else:
        config = MemAOPConfig(k=K, selection="topk", memory="none")
        scale = 0.01 if name == "authors" else 1  # theirs is multiplied by the learning rate
        torch.testing.assert_close(call(x, g), scale * weight_grad(x, g, config))
    half = baselines.make(name, K)(x.bfloat16(), g.bfloat16())
    assert (half.shape, half.dtype) == ((P, N), torch.bfloat16)


@pytest.mark.parametrize("decay", [1.0, 0.25])
def test_authors_formulation_is_our_residual_memory(decay):
    rate = 0.01
    theirs = baselines.MemAOPGD(K, learning_rate=rate, decay=decay)
    config = MemAOPConfig.paper(k=K, selection="topk", memory=Rows(decay=decay))
    memory = new_memory(config, N, P)
    slots = None
    for _ in range(4):
        x, g = torch.randn(M, N, dtype=torch.float64), torch.randn(M, P, dtype=torch.float64)
        gradient = theirs(x, g) / rate
        torch.testing.assert_close(gradient, weight_grad(x, g, config, memory))
        expected = weight_grad_reference(x, g, config, memory=slots, carry=decay**0.5)
        slots = expected.memory
        torch.testing.assert_close(gradient, expected.weight_grad)


def weights_of(name, scores):
    """What a method multiplies each row by: G is a column of ones, row m of X is s_m e_m."""
    g = torch.ones(len(scores), 1, dtype=scores.dtype)
    return baselines.make(name, K)(torch.diag(scores), g)[0] / scores


@pytest.mark.parametrize(
    ("name", "policy"), [("crs", "crs"), ("wta-crs", "wta"), ("vcas", "bernoulli")]
)
def test_same_law_as_our_selection(name, policy):
    scores = torch.logspace(-1.5, 1, M, dtype=torch.float64)
    theirs, ours = [], []
    for _ in range(2000):
        theirs.append(weights_of(name, scores))
        selection = select_rows(scores, K, policy)
        weights = torch.zeros(M, dtype=torch.float64)
        ours.append(weights.index_add_(0, selection.indices, selection.weights))
    theirs, ours = torch.stack(theirs), torch.stack(ours)
    for statistic in (lambda w: w, lambda w: w.square(), lambda w: (w > 0).double()):
        a, b = statistic(theirs), statistic(ours)
        error = ((a.var(0) + b.var(0)) / len(a)).sqrt()
        # 40 rows at 5 standard errors; rare rows have few draws to estimate the error from.
        often = (theirs > 0).sum(0) + (ours > 0).sum(0) > 40
        assert often.sum() > M / 2
        difference = (a.mean(0) - b.mean(0)).abs()
        assert (difference <= 5 * error + 1e-9)[often].all()


def test_bernoulli_crs_keeps_a_uniform_part(batch):
    scores = torch.ones(M, dtype=torch.float64)
    scores[:5] = 1e-9
    draws = torch.stack([weights_of("bernoulli-crs", scores) for _ in range(4000)])
    kept = (draws[:, :5] > 0).double().mean().item()
    expected = 0.1 / M
    assert abs(kept - expected) < 5 * math.sqrt(expected / draws[:, :5].numel())
    assert draws[:, 5:].max() == pytest.approx(1 / (0.9 * K / (M - 5) + expected))
    # The authors' code scales as the formula does.
    torch.manual_seed(3)
    by_rows = baselines.bernoulli_crs(*batch, K)
    torch.manual_seed(3)
    torch.testing.assert_close(baselines.bernoulli_crs_code(*batch, K), by_rows)
