"""The variance of drawing K of M rows, from a few numbers, against its exact value."""

import pytest
import torch

from memaop_triton.sampling.selection import inclusion_probabilities, select_rows
from memaop_triton.sampling.variance import POINTS, variance_at, variance_curve

M = 1000


def scores_of(kind):
    torch.manual_seed(0)
    if kind == "equal":
        return torch.ones(M, dtype=torch.float64)
    normal = torch.randn(M, dtype=torch.float64)
    if kind == "many zeros":
        return normal.abs() * (torch.rand(M) < 0.3)
    return (normal * {"even": 0.3, "skew": 1.0, "heavy": 2.0}[kind]).exp()


KINDS = ("equal", "even", "skew", "heavy", "many zeros")


def exact(scores, k):
    p = inclusion_probabilities(scores, k)
    return (scores[p > 0].square() * (1 / p[p > 0] - 1)).sum().item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.01, 1 / 32, 0.06, 1 / 8, 0.2, 1 / 4, 0.4, 1 / 2, 3 / 4])
def test_it_is_above_the_exact_variance_and_close(kind, share):
    scores, k = scores_of(kind), round(share * M)
    want = exact(scores, k)
    found = variance_at(k / M, *variance_curve(scores).tolist())
    below = 0.99 if share < 1 / 64 else 1 - 1e-6  # there the line is continued
    assert below * want <= found + 1e-9
    assert found <= want + 0.02 * scores.square().sum()


def test_priority_has_it():
    scores = scores_of("heavy").float()
    k, total = 125, scores.sum()
    errors = []
    for seed in range(2000):
        generator = torch.Generator().manual_seed(seed)
        indices, weights = select_rows(scores, k, "priority", generator=generator)
        # Of uncorrelated rows, whose squares add up: one number a row.
        drawn = torch.zeros(M).index_put_((indices,), weights)
        errors.append((scores * (drawn - 1)).square().sum())
    mean = torch.stack(errors).double().mean().item()
    assert variance_at(k / M, *variance_curve(scores).tolist()) == pytest.approx(mean, rel=0.1)
    assert mean > 2 * (total * total / k - scores.square().sum()), "the shorter formula hides it"


def test_all_rows_have_none_and_more_rows_less():
    shares, variances = variance_curve(scores_of("skew")).tolist()
    assert variance_at(1, shares, variances) == variance_at(1.5, shares, variances) == 0
    found = [variance_at(i / 200, shares, variances) for i in range(1, 201)]
    assert sorted(found, reverse=True) == found
    assert shares == sorted(shares)


def test_as_few_rows_as_there_are_are_exact():
    scores = scores_of("many zeros")
    share = (scores > 0).double().mean().item()
    variances = [variance_at(k, *variance_curve(scores).tolist()) for k in (share, 0.9)]
    assert max(variances) < 2e-3 * scores.square().sum()


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e30])
def test_scores_of_any_size(value):
    curve = variance_curve(torch.full((8, M), value, dtype=torch.float64))
    assert curve.shape == (8, 2, POINTS)
    assert curve.isfinite().all()
    share = variance_at(1 / 4, *curve[3].tolist())
    assert share == pytest.approx(3 * M * value**2, rel=1e-6)
