"""The choice among scored rows in C is the oracle's, which is the Triton kernels' too."""

import numpy as np
import pytest
import torch

from memaop_triton.kernels.cpu import native
from memaop_triton.kernels.draws import draw_seed
from memaop_triton.sampling import selection
from tests.compiled import needs_compiler
from tests.pairwise import pairwise
from tests.selecting import expected, uniform

NUMBERS = [torch.float32, torch.float64]
CPU = torch.device("cpu")


def scores_of(count, kind, dtype):
    """Log-normal scores, or such that test one part of the law."""
    scores = torch.randn(count, dtype=dtype).exp()
    some = torch.rand(count) < 0.3
    if kind == "wide":
        scores = scores**20
    elif kind == "ties":  # so small that their keys are multiples of the smallest number there is
        smallest = np.nextafter(0, 1, dtype=np.float32 if dtype == torch.float32 else np.float64)
        scores = torch.randint(1, 4, (count,)) * torch.tensor(smallest)
    elif kind == "zeros":
        scores[torch.rand(count) < 0.95] = 0.0
        scores[some & (scores == 0)] = -0.0
    elif kind == "infinite":
        scores[some] = torch.inf
    elif kind == "few infinite":
        scores[:: max(2, count // 3)] = torch.inf
    elif kind == "nan":
        scores[some] = torch.nan
        scores[-1] = torch.inf
    return scores


@needs_compiler
@pytest.mark.parametrize(
    ("count", "share", "kind", "dtype"),
    pairwise(
        [2, 3, 100, 255, 4096, 32769, 10**6],
        [1 / 8, 1 / 2, 1],
        ["normal", "wide", "ties", "zeros", "infinite", "few infinite", "nan"],
        NUMBERS,
    ),
)
def test_it_chooses_row_by_row_what_the_oracle_chooses(count, share, kind, dtype, generator):
    scores = scores_of(count, kind, dtype)
    k = min(count - 1, max(1, int(share * count)))
    seed = draw_seed(CPU, generator(count))
    for policy in ("priority", "topk"):
        good = expected(scores, k, policy, seed)
        drawn = policy == "priority"
        indices, weights = native.choose(scores, k, draw=drawn, generator=generator(count))
        assert torch.equal(indices, good.indices)
        assert weights.dtype == dtype
        torch.testing.assert_close(weights, good.weights, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("kind", ["normal", "wide", "zeros", "few infinite", "nan"])
def test_pytorch_weighs_the_same_draws_alike(kind, dtype, plain, monkeypatch):
    """Without the C code they come from another generator, and all else is the same."""
    plain()
    scores, seed = scores_of(500, kind, dtype), 1 << 62
    draws = torch.from_numpy(uniform(seed, 500)).to(dtype)
    monkeypatch.setattr(selection, "_to_one", lambda *_: draws)
    indices, weights = selection.select_rows(scores, 200, "priority")
    good = expected(scores, 200, "priority", seed)
    # Rows of weight 0 fill up to K, and any of them will do.
    assert torch.equal(indices[weights > 0], good.indices[good.weights > 0])
    torch.testing.assert_close(weights.sort().values, good.weights.sort().values)


@pytest.mark.parametrize("way", ["C", "PyTorch"], indirect=True)
def test_infinite_rows_come_first_and_finite_ones_keep_their_chances(way, generator):
    scores = torch.tensor([1.0, torch.nan, 3.0, torch.inf, 0.0, 2.0, 40.0])
    drawn, source = torch.zeros(7), generator()
    for _ in range(1000):
        indices, weights = selection.select_rows(scores, 3, "priority", generator=source)
        assert {1, 3} < set(indices.tolist())
        assert (weights[scores[indices].nan_to_num(torch.inf) == torch.inf] == 1).all()
        drawn[indices] += weights
    assert drawn[[1, 3]].tolist() == [1000, 1000]
    # One of the finite rows with a mean weight of 1: the variance is at most 46 − 1.
    torch.testing.assert_close(drawn[[0, 2, 5, 6]] / 1000, torch.ones(4), rtol=0, atol=0.85)
    assert drawn[4] == 0
    indices, weights = selection.select_rows(scores, 1, "priority", generator=source)
    assert indices.item() in (1, 3)
    assert weights.item() == 1


def test_the_default_device_is_nobodys_device(way):
    scores = torch.rand(40, device="cpu")
    torch.set_default_device("meta")
    try:
        indices = selection.select_rows(scores, 5, "topk").indices
        drawn = selection.select_rows(scores, 5, "priority")
    finally:
        torch.set_default_device(None)
    assert torch.equal(indices.sort().values, scores.topk(5).indices.sort().values)
    assert all(part.is_cpu for part in drawn)
