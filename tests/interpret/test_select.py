"""The selection kernels on sizes that a GPU meets, beside the oracle of `tests.selecting`."""

import pytest
import torch

from memaop_triton.kernels.gpu.select import select
from tests.selecting import expected

SIZES = [2, 100, 4096, 40_000]
SEED = (1 << 62) - 12345


def scores_of(rows, kind):
    """Log-normal scores; with many ties; or with rows that are not finite or zero."""
    torch.manual_seed(rows)
    scores = torch.randn(rows).exp()
    if kind == "ties":
        scores = scores.floor()
    if kind == "odd":
        scores[:: max(2, rows // 3)] = torch.nan
        scores[1 :: max(2, rows // 5)] = 0.0
    return scores


@pytest.mark.parametrize("policy", ["topk", "priority", "randk", "uniform", "weightedk"])
@pytest.mark.parametrize("kind", ["smooth", "ties", "odd"])
@pytest.mark.parametrize("rows", SIZES)
def test_rows_and_weights(rows, kind, policy):
    scores = scores_of(rows, kind)
    k = max(1, rows // 8)
    chosen = select(scores, k, policy, torch.tensor([SEED]))
    good = expected(scores, k, policy, SEED)
    assert torch.equal(chosen.indices, good.indices)
    torch.testing.assert_close(chosen.weights, good.weights)


@pytest.mark.parametrize("rows", SIZES)
def test_bernoulli_draws_each_row_by_itself(rows):
    scores = scores_of(rows, "smooth")
    k = max(1, rows // 8)
    chosen = select(scores, k, "bernoulli", torch.tensor([SEED]))
    good = expected(scores, k, "bernoulli", SEED)
    drawn = chosen.weights > 0
    # A draw beside its probability may fall on the other side, for λ is summed in float32.
    different = set(chosen.indices[drawn].tolist()) ^ set(good.indices.tolist())
    assert len(different) <= rows // 100_000
    assert (chosen.indices.diff() > 0).all()
    if not different:
        torch.testing.assert_close(chosen.weights[drawn], good.weights, rtol=1e-5, atol=0)


@pytest.mark.parametrize("k", [1, 99])
@pytest.mark.parametrize("policy", ["topk", "priority", "bernoulli"])
def test_fewer_rows_than_wanted_hold_anything(policy, k):
    """Zero rows fill up, with weight 0, and a bernoulli draw takes each of the others."""
    scores = torch.zeros(100)
    scores[40:50] = 2.0
    rows, weights = select(scores, k, policy, torch.tensor([SEED]))
    assert (rows.diff() > 0).all()
    if k == 99:
        assert set(range(40, 50)) <= set(rows.tolist())
    if policy == "priority":
        assert (weights[scores[rows] == 0] == 0).all()
        assert (weights[scores[rows] > 0] >= 1).all()


@pytest.mark.parametrize("policy", ["priority", "topk", "bernoulli"])
@pytest.mark.parametrize("block_rows", [16, 128])
def test_blocks(block_rows, policy):
    """A unit's rows come together, and those of the last block go beyond M."""
    rows = 1000
    chosen = select(
        scores_of(rows, "smooth"), 3, policy, torch.tensor([SEED]), block_rows=block_rows
    )
    blocks = chosen.indices.view(-1, block_rows)
    assert torch.equal(blocks, blocks[:, :1] + torch.arange(block_rows))
    assert (blocks[:, 0] % block_rows == 0).all()
    if policy != "bernoulli":
        good = expected(scores_of(rows, "smooth"), 3, policy, SEED, block_rows)
        assert torch.equal(chosen.indices, good.indices)
