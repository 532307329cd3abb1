"""Where at most K rows have a gradient (padding, masked tokens, CLS pooling), dW is exact."""

from contextlib import nullcontext

import pytest
import torch

from memaop_triton import new_memory
from memaop_triton.backward.weight_grad import weight_and_bias_grad
from tests.schemes import flat_config
from tests.traffic import interpreted

M, N, P, K = 96, 24, 40, 24
# `randk` and `uniform` do not look at scores, and `crs` draws some rows twice.
UNBIASED = ("priority", "bernoulli", "wta")
POLICIES = ("topk", "weightedk", *UNBIASED)


@pytest.fixture(params=["", "torch", "triton"], ids=["C", "torch", "triton"])
def backend(request, monkeypatch):
    monkeypatch.setenv("MEMAOP_TRITON_BACKEND", request.param)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with interpreted() if request.param == "triton" else nullcontext():
        yield


@pytest.mark.parametrize("block_rows", [1, 16])
@pytest.mark.parametrize("count", [1, K])
@pytest.mark.parametrize(
    ("policy", "memory"),
    [
        *[(policy, "none") for policy in POLICIES],
        *[(policy, side) for policy in UNBIASED for side in ("input", "grad")],
    ],
)
def test_gradient_is_exact(policy, memory, count, block_rows, backend):
    settings = {"memory": "none"} if memory == "none" else {"rank": 4, "side": memory}
    config = flat_config(k=K, selection=policy, block_rows=block_rows, **settings)
    kept = new_memory(config, N, P)
    for seed in range(3):
        torch.manual_seed(seed)
        x, g = torch.randn(M, N), torch.randn(M, P)
        masked = torch.ones(M, dtype=torch.bool)
        start = 32 if block_rows > 1 else seed
        masked[start : start + count] = False
        g[masked] = 0
        dw, db = weight_and_bias_grad(x, g, config, kept)
        torch.testing.assert_close(dw, g.T @ x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(db, g.sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", ["crs", "uniform", "randk"])
def test_the_others_stay_noisy(policy):
    torch.manual_seed(0)
    x, g = torch.randn(M, N), torch.randn(M, P)
    g[K:] = 0
    config = flat_config(k=K, selection=policy, memory="none")
    dw, _ = weight_and_bias_grad(x, g, config)
    assert (dw - g.T @ x).norm() > 0.1 * (g.T @ x).norm()
