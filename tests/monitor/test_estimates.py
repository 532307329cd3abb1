"""What a monitor estimates from single selections, against brute force over many."""

import math

import pytest
import torch

from memaop_triton import MemAOPConfig, new_memory
from memaop_triton.backward.input_grad import select_for_both
from memaop_triton.backward.weight_grad import weight_and_bias_grad
from memaop_triton.monitor.estimates import (
    Figures,
    contributions_of,
    effective_sample_size,
    sampling_variance,
)
from memaop_triton.monitor.observer import LayerObserver
from memaop_triton.reference import weight_grad_reference
from memaop_triton.sampling.selection import Selection
from tests.schemes import flat_config

M, N, P, K = 40, 16, 5, 10
DRAWS = 400


@pytest.fixture
def batch():
    """Rows of unequal size with a direction in common, so that cross terms matter."""
    scale = torch.linspace(0.2, 2, M, dtype=torch.float64).unsqueeze(1)
    x = scale * (torch.randn(M, N, dtype=torch.float64) + 0.5)
    return x, scale.flip(0) * (torch.randn(M, P, dtype=torch.float64) + 0.3)


def figures(observer):
    sums, counts = observer.read()
    *weighted, weight = sums.tolist()
    assert counts[1] == 0
    means = [value / weight for value in weighted]
    return Figures(*means[: len(Figures._fields)])


def observed(config, x, g, draws=DRAWS):
    """Squared errors of that many weight gradients, and the averages of their figures."""
    observer = LayerObserver(1, 1 - 1e-9, x.device)  # all observations count alike
    memory = new_memory(config, N, P)
    if memory is not None:
        memory.begin_step(x + torch.randn_like(x), g + torch.randn_like(g), config)
    errors = []
    for _ in range(draws):
        given = None
        if config.grad_input_name == "sampled":
            given = select_for_both(x, g, config, config.k)
        dw = weight_and_bias_grad(x, g, config, memory, selection=given, observer=observer).weight
        errors.append((dw - g.T @ x).square().sum())
    return torch.stack(errors), figures(observer), memory


def assert_is_the_mean_squared_error(config, x, g):
    errors, found, _ = observed(config, x, g)
    mean, error_bar = float(errors.mean()), float(errors.std()) / math.sqrt(DRAWS)
    if config.selection == "wta":  # an upper bound, by ‖Σ_rest A‖² / (K − c)
        assert mean - 4 * error_bar < found.sampling_variance < 2 * mean
    else:
        # The estimate is as noisy as the errors are, or less.
        assert found.sampling_variance == pytest.approx(mean, abs=6 * error_bar)
        assert 6 * error_bar < 0.3 * found.sampling_variance


@pytest.mark.parametrize(
    ("memory", "grad_input"), [("none", "exact"), ("subspace", "exact"), ("subspace", "sampled")]
)
def test_sampling_variance_is_the_mean_squared_error(unbiased, memory, grad_input, batch):
    unbiased = unbiased | {"memory": memory, "grad_input": grad_input}
    config = flat_config(k=K, rank=4, side="input", refresh_every=10**9, **unbiased)
    assert_is_the_mean_squared_error(config, *batch)


@pytest.mark.parametrize("memory", ["none", "subspace"])
@pytest.mark.parametrize("selection", ["crs", "uniform"])
def test_of_a_step_with_a_subspace_only_the_sampled_part_counts(
    selection, memory, batch, selections
):
    x, g = batch
    config = flat_config(k=K, rank=4, side="input", memory=memory, selection=selection)
    _, found, kept = observed(config, x, g, draws=1)
    (chosen,) = selections
    basis = torch.zeros(N, 1, dtype=x.dtype) if kept is None else kept.basis
    rest = x - x @ basis @ basis.T
    scores = rest.norm(dim=1) * g.norm(dim=1)
    outer = torch.einsum("kp,kn->kpn", g[chosen.indices], rest[chosen.indices])
    drawn = K * chosen.weights[:, None, None] * outer  # each an estimate by itself
    if selection == "crs":
        expected = drawn.flatten(1).var(0, correction=1).sum() / K
    else:
        mean = drawn.flatten(1).mean(0)
        expected = (M - K) / (K - 1) * (scores.square().sum() - mean.square().sum() / M)
    assert found.sampling_variance == pytest.approx(float(expected))


def test_variance_of_whole_blocks_whose_rows_are_uncorrelated(unbiased):
    # Orthogonal rows: a block's squared norm is the sum of its rows'.
    config = MemAOPConfig(k=96, memory="none", block_rows=16, **unbiased)
    x = torch.linspace(0.3, 2, 160, dtype=torch.float64).diag()
    g = torch.ones(160, 1, dtype=torch.float64)
    assert_is_the_mean_squared_error(config, x, g)


@pytest.mark.parametrize("selection", ["crs", "uniform"])
def test_a_single_draw_gives_an_upper_bound(selection, batch):
    config = MemAOPConfig(k=1, memory="none", selection=selection)
    x, g = batch
    errors, found, _ = observed(config, x, g, draws=600)
    expected = float(errors.mean()) + float((g.T @ x).square().sum())
    assert found.sampling_variance == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("k", [K, M])
@pytest.mark.parametrize(
    ("memory", "side"), [("none", "auto"), ("subspace", "input"), ("subspace", "grad")]
)
def test_figures_of_the_batch_are_those_of_the_definition(memory, side, k, batch):
    x, g = batch
    config = flat_config(k=k, memory=memory, rank=4, side=side, refresh_every=10**9)
    _, found, kept = observed(config, x, g, draws=1 if k == M else DRAWS)
    basis = None if kept is None else kept.basis
    scores = weight_grad_reference(x, g, config, basis=basis, side=side).scores
    assert found.score_sum == pytest.approx(float(scores.sum()))
    outer = torch.einsum("mp,mn->mpn", g, x).flatten(1)
    assert found.batch_square_sum == pytest.approx(float(outer.square().sum()))
    assert found.nonzero_rows == pytest.approx(M)
    # The variance of dense gradients from batch to batch.
    expected = M * float(outer.var(0, correction=1).sum())
    assert found.batch_variance == pytest.approx(expected, rel=1e-9 if k == M else 0.02)
    dense = float(outer.sum(0).square().sum())
    assert found.gradient_square == pytest.approx(dense, rel=1e-9 if k == M else 0.1)


def test_rows_drawn_twice_count_once():
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    selection = Selection(torch.tensor([1, 1, 3, 9]), torch.tensor([0.5, 0.5, 2.0, 7.0]))
    contributions = contributions_of(selection, scores)
    assert contributions.tolist() == [0, 2, 0, 8]
    assert float(effective_sample_size(contributions)) == pytest.approx(100 / 68)
    assert float(effective_sample_size(torch.zeros(3))) == 0


def test_names_beyond_the_last_row_add_nothing_to_the_variance():
    config = MemAOPConfig(k=32, block_rows=16, memory="none", selection="priority")
    scores = torch.rand(40).double() + 1
    weights = torch.cat([torch.full((16,), 2.0), torch.full((16,), 3.0)])
    inside = Selection(torch.arange(16, 40), weights[:24])
    beyond = Selection(torch.arange(16, 48), weights)
    expected = 2 * scores[16:32].square().sum() + 6 * scores[32:].square().sum()
    for selection in (inside, beyond):
        found = sampling_variance(config, config.k, selection, scores, torch.zeros(()))
        assert float(found) == pytest.approx(float(expected))
