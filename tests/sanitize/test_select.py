"""The selection kernels as compiled: values, bounds, races between programs."""

import pytest
import torch

from memaop_triton.kernels.gpu import select, select_shared
from tests.selecting import expected

SEED = 81985529216486895


def seed():
    return torch.tensor([SEED], device="cuda")


pytestmark = pytest.mark.parametrize("gpu", [80], indirect=True, ids=["sm_80"])


@pytest.mark.parametrize("block_rows", [1, 4])
@pytest.mark.parametrize("policy", ["topk", "priority", "randk", "uniform", "weightedk"])
@pytest.mark.parametrize("several", [False, True], ids=["one program", "several"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_and_weights(policy, block_rows, several, dtype, monkeypatch):
    if several:
        monkeypatch.setattr(select, "ONE_PROGRAM", 1)
        monkeypatch.setattr(select_shared, "SHARE", 64)
        monkeypatch.setattr(select_shared, "CHUNK", 32)
    scores = torch.randn(203, device="cuda").exp()
    scores[7], scores[100] = torch.nan, torch.inf
    k = 40 // block_rows
    filled = torch.ones(203, dtype=torch.bool, device="cuda")
    taken = ~filled
    rows, weights, factors = select.select(
        scores, k, policy, seed(), block_rows=block_rows, dtype=dtype, filled=filled, taken=taken
    )
    good = expected(scores, k, policy, SEED, block_rows)
    assert torch.equal(rows, good.indices)
    torch.testing.assert_close(weights, good.weights)
    assert torch.equal(taken.nonzero()[:, 0], rows[rows < 203])
    assert torch.equal(filled, ~taken)
    scale = 1 if factors.scale is None else factors.scale
    torch.testing.assert_close(
        factors.factors * scale, weights, rtol=2**-8, atol=0, check_dtype=False
    )


@pytest.mark.parametrize("several", [False, True], ids=["one program", "several"])
def test_bernoulli(several, monkeypatch):
    if several:
        monkeypatch.setattr(select, "ONE_PROGRAM", 1)
        monkeypatch.setattr(select_shared, "SHARE", 64)
        monkeypatch.setattr(select_shared, "CHUNK", 32)
    scores = torch.randn(203, device="cuda").exp()
    rows, weights, _ = select.select(scores, 40, "bernoulli", seed())
    good = expected(scores, 40, "bernoulli", SEED)
    assert torch.equal(rows[weights > 0], good.indices)
    torch.testing.assert_close(weights[weights > 0], good.weights)
    assert (rows.diff() > 0).all()
