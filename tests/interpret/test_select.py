"""The selection kernels on sizes that a GPU meets, beside the oracle of `tests.selecting`."""

import pytest
import torch

from memaop_triton.kernels.cpu import native
from memaop_triton.kernels.draws import draw_seed
from memaop_triton.kernels.gpu.row_weights import row_weights
from memaop_triton.kernels.gpu.select import select
from memaop_triton.kernels.targets import TARGETS
from tests.compiled import needs_compiler
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
    chosen = select(scores, k, policy, SEED)
    good = expected(scores, k, policy, SEED)
    assert torch.equal(chosen.indices, good.indices)
    torch.testing.assert_close(chosen.weights, good.weights)


@pytest.mark.slow
def test_a_million_rows():
    scores = scores_of(10**6, "smooth")
    chosen = select(scores, 125_000, "priority", SEED)
    good = expected(scores, 125_000, "priority", SEED)
    assert torch.equal(chosen.indices, good.indices)
    torch.testing.assert_close(chosen.weights, good.weights)


@needs_compiler
@pytest.mark.parametrize("policy", ["topk", "priority"])
@pytest.mark.parametrize("kind", ["smooth", "ties", "odd"])
@pytest.mark.parametrize("rows", SIZES)
def test_the_c_code_chooses_alike(rows, kind, policy, generator):
    scores, k = scores_of(rows, kind), max(1, rows // 8)
    chosen = select(scores, k, policy, draw_seed(scores.device, generator()))
    indices, weights = native.choose(scores, k, draw=policy == "priority", generator=generator())
    assert torch.equal(chosen.indices, indices)
    torch.testing.assert_close(chosen.weights, weights, rtol=2**-23, atol=0)


@pytest.mark.parametrize("rows", SIZES)
def test_bernoulli_draws_each_row_by_itself(rows):
    scores = scores_of(rows, "smooth")
    k = max(1, rows // 8)
    chosen = select(scores, k, "bernoulli", SEED)
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
    rows, weights, _ = select(scores, k, policy, SEED)
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
    chosen = select(scores_of(rows, "smooth"), 3, policy, SEED, block_rows=block_rows)
    blocks = chosen.indices.view(-1, block_rows)
    assert torch.equal(blocks, blocks[:, :1] + torch.arange(block_rows))
    assert (blocks[:, 0] % block_rows == 0).all()
    if policy != "bernoulli":
        good = expected(scores_of(rows, "smooth"), 3, policy, SEED, block_rows)
        assert torch.equal(chosen.indices, good.indices)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "block_rows"), [(1000, 1), (1000, 16), (17_000, 1)])
def test_what_else_a_selection_sets(rows, block_rows, dtype):
    """Factors in the dtype of the rows, flags of a row memory; a seed on the device is the same."""
    scores, filled = scores_of(rows, "smooth"), torch.arange(rows) % 3 > 0
    before, taken = filled.clone(), torch.arange(rows) % 2 == 0
    chosen = select(
        scores, 40, "priority", SEED, block_rows=block_rows, dtype=dtype, filled=filled, taken=taken
    )
    again = select(scores, 40, "priority", torch.tensor([SEED]), block_rows=block_rows)
    assert torch.equal(chosen.indices, again.indices)
    assert torch.equal(chosen.weights, again.weights)
    selected = torch.zeros(rows, dtype=torch.bool)
    selected[chosen.indices[chosen.indices < rows]] = True
    assert torch.equal(taken, selected)
    assert torch.equal(filled, before & ~selected)
    check_factors(chosen.factors, chosen.weights, dtype)


def check_factors(made, weights, dtype):
    """Factors times scale are the weights to rounding."""
    assert made.factors.dtype == dtype
    if dtype == torch.float32:
        assert made.scale is None
        assert torch.equal(made.factors, weights)
    else:
        torch.testing.assert_close(made.factors * made.scale, weights, rtol=2**-10, atol=0)


@pytest.mark.parametrize(
    ("weights", "scale"),
    [
        ([1.0, 1.0], 1),
        ([0.0, 0.0], 1),
        ([8.0, 8.0, 0.0], 8),  # rows of equal weights do not grow
        ([4096.0] * 3, 64),
        ([2.0**20, 1.0], 2**10),  # the root of the largest
        ([2.0**20 + 1, 1.0], 2**11),
        ([3.0, 2.5], 4),
        ([2.0**40, 1.0], 2**12),
        ([], 1),
    ],
)
def test_scale_of_float16_weights(weights, scale):
    weights = torch.tensor(weights)
    made = row_weights(weights, TARGETS["sm_90"], torch.float16)
    assert made.scale == scale
    assert torch.equal(made.factors, (weights / scale).half())


def test_rows_without_scores():
    taken = torch.ones(300, dtype=torch.bool)
    chosen = select(None, 37, "randk", SEED, taken=taken)
    assert torch.equal(chosen.indices, expected(torch.ones(300), 37, "randk", SEED).indices)
    assert torch.equal(taken.nonzero()[:, 0], chosen.indices)
    with pytest.raises(ValueError, match="scores or taken"):
        select(None, 37, "randk", SEED)
