import itertools
import math

import pytest
import torch

from memaop_triton.config import SELECTIONS
from memaop_triton.sampling import selection
from memaop_triton.sampling.selection import inclusion_probabilities, select_rows
from tests.pairwise import pairwise

SCORES = torch.tensor([0.3, 2.0, 0.9, 4.0, 1.4, 0.6], dtype=torch.float64)
WEIGHTED = ("priority", "crs", "bernoulli", "wta")


def sequential_inclusion(masses, k):
    """Chance of each row to be among k draws without replacement, by all their orders."""
    chance = torch.zeros(len(masses), dtype=torch.float64)
    for order in itertools.permutations(range(len(masses)), k):
        p, left = 1.0, sum(masses)
        for row in order:
            p *= masses[row] / left
            left -= masses[row]
        chance[list(order)] += p
    return chance


def test_topk_takes_the_largest_and_uniform_weights_are_rows_over_k():
    indices, weights = select_rows(SCORES, 3, "topk")
    assert indices.tolist() == [1, 3, 4]
    assert weights.tolist() == [1, 1, 1]
    assert select_rows(SCORES, 4, "randk").weights.tolist() == [1] * 4
    assert select_rows(SCORES, 4, "uniform").weights.tolist() == [1.5] * 4


# How often each row is drawn in the mean.
LAWS = {
    "weightedk": lambda k: sequential_inclusion(SCORES.square().tolist(), k),
    "randk": lambda k: torch.full((6,), k / 6, dtype=torch.float64),
    "crs": lambda k: k * SCORES / SCORES.sum(),
    "bernoulli": lambda k: inclusion_probabilities(SCORES, k),
}


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("policy", LAWS)
def test_rows_are_drawn_by_their_law_and_weighted_by_the_inverse(policy, k, generator):
    expected, draws, generator = LAWS[policy](k), 4000, generator()
    found = torch.zeros(6, dtype=torch.float64)
    for _ in range(draws):
        indices, weights = select_rows(SCORES, k, policy, generator=generator)
        drawn = indices[weights > 0]
        found += torch.bincount(drawn, minlength=6) / draws
        if policy in WEIGHTED:
            torch.testing.assert_close(weights[weights > 0], 1 / expected[drawn])
    # Draws with replacement have the larger variance.
    chance = expected / k if policy == "crs" else expected
    error_bar = (expected * (1 - chance).clamp(min=0.01) / draws).sqrt()
    assert ((found - expected).abs() <= 4 * error_bar + 1e-9).all(), (found, expected)


@pytest.mark.parametrize("seed", range(20))
def test_without_the_c_code_priority_draws_in_pytorch(seed, generator, monkeypatch):
    monkeypatch.setenv("MEMAOP_TRITON_BACKEND", "torch")
    u = 1 - torch.rand(6, dtype=torch.float64, generator=generator(seed))
    keys = SCORES / u
    threshold = keys.sort(descending=True).values[3]
    indices, weights = select_rows(SCORES, 3, "priority", generator=generator(seed))
    assert indices.tolist() == (keys > threshold).nonzero().flatten().tolist()
    torch.testing.assert_close(weights, (threshold / SCORES[indices]).clamp(min=1))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("power", [0.0, 1.0, 4.0])
def test_inclusion_probabilities_sum_to_k_and_are_proportional_below_one(k, power):
    scores = SCORES**power
    p = inclusion_probabilities(scores, k)
    assert p.sum().item() == pytest.approx(k)
    assert (p <= 1).all()
    ratio = (p / scores)[p < 1]
    if ratio.numel():
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
        assert (scores[p == 1] * ratio[0] >= 1 - 1e-12).all()


def test_bernoulli_that_draws_beyond_its_size_weights_a_part_up(monkeypatch):
    p, size = 4 / 400, 4 + 6 * 2 + 6
    draws = torch.full((400,), 2 * p, dtype=torch.float64)
    draws[:100] = p * torch.rand(100, dtype=torch.float64)
    monkeypatch.setattr(selection, "_to_one", lambda *_: draws)
    indices, weights = select_rows(torch.ones(400, dtype=torch.float64), 4, "bernoulli")
    assert indices.numel() == size
    assert indices.max() < 100
    torch.testing.assert_close(weights, torch.full_like(weights, 100 / size / p))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
def test_wta_keeps_the_top_rows_that_brute_force_keeps(k, power, generator):
    scores = SCORES**power
    ordered, order = scores.sort(descending=True)
    left = [(ordered[c:].sum() / (k - c)).item() for c in range(k)]
    c = min(range(k), key=left.__getitem__)
    indices, weights = select_rows(scores, k, "wta", generator=generator())
    certain = set(order[:c].tolist())
    assert {i for i in indices.tolist() if i in certain} == certain
    for index, weight in zip(indices.tolist(), weights.tolist(), strict=True):
        expected = 1.0 if index in certain else left[c] / scores[index].item()
        assert weight == pytest.approx(expected)


@pytest.mark.parametrize(
    ("policy", "sizes", "dtype"),
    pairwise(SELECTIONS, [(40, 1), (40, 7), (40, 39), (2, 1)], [torch.float32, torch.float64]),
)
def test_indices_ascend_and_weights_have_the_dtype_of_the_scores(policy, sizes, dtype):
    rows, k = sizes
    indices, weights = select_rows(torch.rand(rows, dtype=dtype), k, policy)
    assert indices.dtype == torch.int64
    assert weights.dtype == dtype
    assert indices.shape == weights.shape
    assert (indices.diff() >= 0).all()
    assert indices.min() >= 0
    assert indices.max() < rows
    assert indices.numel() == k or policy == "bernoulli"
    if policy not in ("crs", "wta"):
        assert indices.unique().numel() == indices.numel()


@pytest.mark.parametrize("policy", SELECTIONS)
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (1, 5), (6, 6), (6, 7)])
def test_k_of_at_least_all_rows_returns_each_once_with_weight_one(policy, rows, k):
    indices, weights = select_rows(torch.rand(rows), k, policy)
    assert indices.tolist() == list(range(rows))
    assert weights.tolist() == [1.0] * rows


@pytest.mark.parametrize("policy", SELECTIONS)
def test_same_generator_seed_gives_the_same_selection(policy, generator):
    scores = torch.rand(50)
    first, second = (select_rows(scores, 9, policy, generator=generator(5)) for _ in range(2))
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.weights, second.weights)
    if policy != "topk":
        torch.manual_seed(1)
        state = torch.get_rng_state()
        select_rows(scores, 9, policy, generator=generator())
        assert torch.equal(torch.get_rng_state(), state)
        select_rows(scores, 9, policy)
        assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("policy", SELECTIONS)
@pytest.mark.parametrize("positive", [{}, {2: 1.0, 7: 3.0}], ids=["none", "two"])
def test_fewer_scores_than_k_are_all_covered(policy, positive, generator):
    scores = torch.zeros(12)
    for row, score in positive.items():
        scores[row] = score
    draws = generator()
    for _ in range(20):
        indices, weights = select_rows(scores, 5, policy, generator=draws)
        picked = set(indices[weights > 0].tolist())
        assert weights.isfinite().all()
        assert indices.numel() == 5 or policy == "bernoulli"
        if policy in WEIGHTED:
            assert picked <= positive.keys()
        if policy not in ("crs", "randk", "uniform"):
            assert picked >= positive.keys()
        if policy in ("priority", "bernoulli", "wta"):
            assert (weights[weights > 0] == 1).all()


@pytest.mark.parametrize("policy", SELECTIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bad", [[4], [1, 4, 9], list(range(10))])
@pytest.mark.parametrize("k", [1, 3])
def test_rows_that_are_not_finite_come_first(policy, value, bad, k, generator):
    scores = torch.rand(12)
    scores[bad] = value
    for seed in range(20):
        indices, weights = select_rows(scores, k, policy, generator=generator(seed))
        picked = set(indices[weights > 0].tolist())
        assert weights.isfinite().all()
        if policy in ("crs", "bernoulli", "wta"):
            assert picked
            assert picked <= set(bad)
        else:
            assert len(picked & set(bad)) == min(k, len(bad))


@pytest.mark.parametrize(
    ("scores", "k", "policy", "error", "message"),
    [
        (SCORES, 1, "prioritty", ValueError, "policy='prioritty'.*Did you mean 'priority'"),
        (SCORES[None], 1, "topk", ValueError, r"scores must be a vector, got shape \(1, 6\)"),
        (SCORES.long(), 1, "topk", TypeError, "float32 or float64, got torch.int64"),
        (SCORES.half(), 1, "topk", TypeError, "float32 or float64, got torch.float16"),
        (SCORES, 0, "topk", ValueError, "k=0 must be at least 1"),
    ],
)
def test_bad_arguments(scores, k, policy, error, message):
    with pytest.raises(error, match=message):
        select_rows(scores, k, policy)
