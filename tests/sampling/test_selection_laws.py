"""Selections have the laws that they are drawn by, at every size: in C, in PyTorch, in the oracle.

The oracle is what the Triton kernels choose row by row (`tests/interpret/test_select.py`).
"""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from memaop_triton.kernels.cpu import native
from memaop_triton.kernels.draws import draw_seed
from memaop_triton.sampling.selection import select_rows
from tests import selecting
from tests.compiled import needs_compiler

SCORES = torch.tensor([0.3, 2.0, 0.9, 4.0, 1.4, 0.6])
C_CODE, PYTORCH, ORACLE = pytest.param("C", marks=needs_compiler), "PyTorch", "oracle"


@pytest.fixture
def choose(way, monkeypatch):
    """Chooses as `select_rows` does, in this way; rows of weight 0 are left out."""
    monkeypatch.setenv("MEMAOP_TRITON_BACKEND", "torch" if way == "PyTorch" else "")

    def choose(scores, k, policy, generator):
        if way == "oracle":
            seed = draw_seed(scores.device, generator)
            indices, weights, *_ = (a.numpy() for a in selecting.expected(scores, k, policy, seed))
        else:
            chosen = select_rows(scores, k, policy, generator=generator)
            indices, weights = (a.numpy() for a in chosen)
        return indices[weights > 0], weights[weights > 0].astype(np.float64)

    return choose


def chance_of_at_most(most, chances):
    """That `most` or fewer of independent events of these chances happen."""
    counts = np.zeros(len(chances) + 1)
    counts[0] = 1
    for p in chances:
        counts[1:] = counts[1:] * (1 - p) + counts[:-1] * p
        counts[0] *= 1 - p
    return counts[: most + 1].sum()


def priority_inclusion(scores, k):
    """Chance of each row to be among the k largest s/u.

    Row i with u is one of them if fewer than k others have a key above s_i/u, each with chance
    min(1, s_j u/s_i). Between the places where one of these reaches 1 that is a polynomial of u.
    """
    points, shares = np.polynomial.legendre.leggauss(len(scores))
    chances = np.zeros(len(scores))
    for i, score in enumerate(scores):
        others = np.delete(scores, i)
        ends = np.unique([0, 1, *(score / others)[others > score]])
        for low, high in itertools.pairwise(ends):
            for point, share in zip(points, shares, strict=True):
                u = low + (point + 1) / 2 * (high - low)
                larger = np.minimum(1, others * u / score)
                chances[i] += share / 2 * (high - low) * chance_of_at_most(k - 1, larger)
    return chances


def test_the_law_of_priority_sums_to_k_and_is_known_for_two_rows():
    assert priority_inclusion(SCORES.double().numpy(), 3).sum() == pytest.approx(3)
    # The larger of two keys, s₀/u₀ > s₁/u₁ for s₀ < s₁: the chance is s₀/2s₁.
    np.testing.assert_allclose(priority_inclusion(np.array([1.0, 3.0]), 1), [1 / 6, 5 / 6])


@pytest.mark.slow
@pytest.mark.parametrize("way", [C_CODE, PYTORCH, ORACLE])
def test_priority_includes_rows_by_its_law_and_weights_are_unbiased(choose, generator):
    draws, source = 100_000, generator()
    chances = priority_inclusion(SCORES.double().numpy(), 3)
    found, sums, squares = np.zeros((3, 6))
    for _ in range(draws):
        indices, weights = choose(SCORES, 3, "priority", source)
        found[indices] += 1
        sums[indices] += weights
        squares[indices] += weights**2
    error_bar = np.sqrt(chances * (1 - chances) / draws)
    assert (abs(found / draws - chances) <= 4 * error_bar).all(), (found / draws, chances)
    error_bar = np.sqrt((squares / draws - 1) / draws)
    assert (abs(sums / draws - 1) <= 4 * error_bar).all(), (sums / draws - 1) / error_bar


def parts_of(scores):
    """Rows in parts of similar score, of neighbours, and of equal remainders by 8."""
    rows = np.arange(len(scores))
    by_score = np.array_split(np.argsort(scores, kind="stable"), 8)
    neighbours = np.array_split(rows, 8)
    remainders = [rows[first::8] for first in range(8)]
    return [part for part in (*by_score, *neighbours, *remainders) if len(part)]


def check_priority(choose, rows, draws, generator):
    """K rows in each draw, and the weights in each part of the rows sum to its size in the mean.

    Estimates of different rows are uncorrelated, and Σ w(w − 1) over the selected is in the mean
    the variance of Σ w (Duffield, Lund, Thorup 2007). So the error bars are known well from few
    draws; where they are too small for what is found, draws of different rows are not independent.
    """
    scores = (1.2 * torch.randn(rows, generator=generator)).exp()
    k, parts = max(1, rows // 8), parts_of(scores.numpy())
    sums, variances = np.zeros((2, draws, len(parts)))
    for draw in range(draws):
        indices, weights = choose(scores, k, "priority", generator)
        assert len(indices) == k
        assert (np.diff(indices) > 0).all()
        assert indices[0] >= 0
        assert indices[-1] < rows
        estimates = np.zeros(rows)
        estimates[indices] = weights
        sums[draw] = [estimates[part].sum() for part in parts]
        variances[draw] = [(estimates[part] * (estimates[part] - 1)).sum() for part in parts]
    errors = (sums - [len(part) for part in parts]) / np.sqrt(variances.mean(0) + 1e-12)
    along = errors.mean(0) * math.sqrt(draws)
    assert (abs(along) <= 4).all(), along
    if k > 1:  # of one row alone the variance is infinite
        squares = (errors**2).mean(1)
        bar = squares.std() / math.sqrt(draws)
        assert abs(squares.mean() - 1) <= 4 * bar, (squares.mean(), bar)


SIZES = [
    (2, 20_000),
    (100, 2000),
    (4096, 300),
    pytest.param(32768, 100, marks=pytest.mark.slow),
    pytest.param(10**6, 20, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("rows", "draws"), SIZES)
@pytest.mark.parametrize("way", [C_CODE, PYTORCH, ORACLE])
def test_priority_is_unbiased_at_every_size(choose, rows, draws, generator):
    check_priority(choose, rows, draws, generator(rows))


@pytest.mark.parametrize("way", [C_CODE, PYTORCH])
def test_the_only_row_is_taken(choose, generator):
    indices, weights = choose(torch.tensor([0.1]), 1, "priority", generator())
    assert (indices.tolist(), weights.tolist()) == ([0], [1])


# Draws from a generator that is not good enough, from those of a good one.
WRONG = {
    "8 bits": lambda u: np.ceil(u * 256) / np.float32(256),
    "a counter that repeats": lambda u: np.resize(u[:1024], len(u)),
    "one word of each counter": lambda u: u[::4].repeat(4)[: len(u)],
    "a square": lambda u: u * u,
}


@pytest.mark.parametrize("way", [ORACLE])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_the_statistic_sees_wrong_generators(wrong, choose, generator, monkeypatch):
    uniform = selecting.uniform
    monkeypatch.setattr(selecting, "uniform", lambda *args: wrong(uniform(*args)))
    with pytest.raises(AssertionError):
        check_priority(choose, 4096, 300, generator(4096))


@pytest.mark.parametrize("way", [ORACLE])
def test_the_statistic_sees_a_seed_without_effect(choose, generator, monkeypatch):
    uniform = selecting.uniform
    monkeypatch.setattr(selecting, "uniform", lambda seed, count: uniform(1, count))
    with pytest.raises(AssertionError, match="array"):
        check_priority(choose, 4096, 300, generator(4096))


def law_of_draws_without_replacement(masses, k):
    """Chance of every set of k rows, drawn one after the other."""
    law = Counter()
    for order in itertools.permutations(range(len(masses)), k):
        p, left = 1.0, sum(masses)
        for row in order:
            p *= masses[row] / left
            left -= masses[row]
        law[tuple(sorted(order))] += p
    return law


def law_of_independent_rows(chances):
    law = Counter()
    for taken in itertools.product([False, True], repeat=len(chances)):
        p = math.prod(c if t else 1 - c for t, c in zip(taken, chances, strict=True))
        law[tuple(row for row, t in enumerate(taken) if t)] += p
    return law


FIVE = [0.4, 1.5, 0.7, 2.5, 1.1]
# Of all sets of rows. For K = 2 the largest of the five scores is below half of their sum, 6.2.
LAWS = {
    "weightedk": law_of_draws_without_replacement([score**2 for score in FIVE], 2),
    "randk": law_of_draws_without_replacement([1.0] * 5, 2),
    "uniform": law_of_draws_without_replacement([1.0] * 5, 2),
    "bernoulli": law_of_independent_rows([score * 2 / 6.2 for score in FIVE]),
}


@pytest.mark.parametrize("way", [PYTORCH, ORACLE])
@pytest.mark.parametrize("policy", LAWS)
def test_sets_of_rows_are_drawn_by_their_law(choose, policy, generator):
    law, draws, source, found = LAWS[policy], 4000, generator(), Counter()
    assert sum(law.values()) == pytest.approx(1)
    for _ in range(draws):
        found[tuple(choose(torch.tensor(FIVE), 2, policy, source)[0].tolist())] += 1
    assert found.keys() <= law.keys()
    for rows, chance in law.items():
        error_bar = math.sqrt(chance * (1 - chance) / draws)
        assert abs(found[rows] / draws - chance) <= 4 * error_bar + 1 / draws, rows
    statistic = sum((found[s] - draws * p) ** 2 / (draws * p) for s, p in law.items())
    freedom = len(law) - 1
    assert statistic <= freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("way", [PYTORCH, ORACLE])
def test_bernoulli_takes_a_row_that_would_exceed_one_always(choose, generator):
    """λ = (K − 1)/(the sum of all but the largest score), with K = 3."""
    chances = np.minimum(1, SCORES.double().numpy() * 2 / 5.2)
    draws, source, found = 2000, generator(), np.zeros(6)
    for _ in range(draws):
        indices, weights = choose(SCORES, 3, "bernoulli", source)
        found[indices] += 1
        np.testing.assert_allclose(weights, 1 / chances[indices], rtol=1e-6)
    error_bar = np.sqrt(chances * (1 - chances) / draws)
    assert (abs(found / draws - chances) <= 4 * error_bar).all()


# Seed, unit and draw: of 200 seeds from 2⁶² on and 10⁶ units, the first with the extreme draws.
EXTREMES = {
    "smallest": ((1 << 62) + 57, 848_765, 2.0**-24),
    "largest": ((1 << 62) + 9, 451_427, 1.0),
}


@needs_compiler
@pytest.mark.parametrize(("seed", "unit", "draw"), EXTREMES.values(), ids=EXTREMES)
def test_draws_are_above_zero_and_up_to_one(seed, unit, draw, monkeypatch):
    u = selecting.uniform(seed, unit + 2)
    assert u[unit] == draw
    monkeypatch.setattr(native, "draw_seed", lambda *_: seed)
    scores = torch.zeros(unit + 2, dtype=torch.float64)
    scores[unit] = draw  # its key is 1
    for key, taken in ((1 - 2.0**-30, unit), (1 + 2.0**-30, unit + 1)):
        scores[unit + 1] = key * float(u[unit + 1])
        assert native.choose(scores, 1, draw=True)[0].tolist() == [taken]
