"""The oracle of the selection kernels and of the C code: the same draws and keys, in plain NumPy.

Philox 4x32-10 as Salmon, Moraes, Dror and Shaw describe it (SC 2011). Below it the check that the
suites with a pretended GPU make of the kernels.
"""

from typing import NamedTuple

import numpy as np
import torch

from memaop_triton import dispatch
from memaop_triton.kernels.cpu import native
from memaop_triton.kernels.draws import NOT_DRAWN
from memaop_triton.kernels.gpu import select as kernels
from memaop_triton.kernels.gpu import select_shared
from memaop_triton.sampling.selection import select

SEED = 81985529216486895

_LOW = np.uint64(0xFFFFFFFF)


def _philox(seed, counters):
    """Four words of 32 bits for each counter: [counters, 4] uint32."""
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    state = [counters.astype(np.uint64), *(np.zeros(len(counters), np.uint64) for _ in range(3))]
    for _ in range(10):
        first, second = state[0] * np.uint64(0xD2511F53), state[2] * np.uint64(0xCD9E8D57)
        state = [
            (second >> np.uint64(32)) ^ state[1] ^ key[0],
            second & _LOW,
            (first >> np.uint64(32)) ^ state[3] ^ key[1],
            first & _LOW,
        ]
        key = [(key[0] + np.uint64(0x9E3779B9)) & _LOW, (key[1] + np.uint64(0xBB67AE85)) & _LOW]
    return np.stack(state, axis=1).astype(np.uint32)


def uniform(seed, count):
    """The draws of `count` units from (0, 1], float32."""
    words = _philox(seed, np.arange(-(-count // 4))).reshape(-1)[:count]
    return ((words >> 8) + 1).astype(np.float32) * np.float32(2**-24)


class Expected(NamedTuple):
    """As `kernels.gpu.select.Selected`; with `bernoulli` only the units that were drawn."""

    indices: torch.Tensor
    weights: torch.Tensor


def expected(scores, k, policy, seed, block_rows=1):
    """What they have to choose; weights in the dtype of the scores."""
    units = -(-scores.numel() // block_rows)
    padded = torch.nn.functional.pad(scores.cpu(), (0, units * block_rows - scores.numel()))
    s = padded.view(units, block_rows).sum(1).nan_to_num(nan=np.inf, posinf=np.inf).numpy()
    u = uniform(seed, units)
    weights = np.ones(units)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if policy == "bernoulli":
            p = _probabilities(s, k)
            chosen = np.flatnonzero(u <= p)
            weights = 1 / p
        else:
            key = {
                "topk": s,
                "priority": s / u,
                "weightedk": s / np.sqrt(np.maximum(-np.log(u), np.float32(2**-26))),
            }.get(policy, u)
            key = np.where(np.isinf(s), np.inf, key)
            order = np.lexsort((np.arange(units), -key))
            chosen = np.sort(order[:k])
            if policy == "priority":
                ratio = key[order[k]] / s
                weights = np.where(np.isinf(s), 1, np.where(s > 0, np.maximum(1, ratio), 0))
            if policy == "uniform":
                weights = np.full(units, units / k)
    rows = chosen[:, None] * block_rows + np.arange(block_rows)
    return Expected(
        torch.from_numpy(rows.reshape(-1)).to(scores.device),
        torch.from_numpy(weights[chosen].repeat(block_rows).astype(s.dtype)).to(scores.device),
    )


def _probabilities(s, k):
    """min(1, λ s) with a sum of `k`, by bisection of λ."""
    low, high = 0.0, 1e30
    for _ in range(300):
        middle = (low * high) ** 0.5 if low else high / 2
        low, high = (low, middle) if np.minimum(1, s * middle).sum() > k else (middle, high)
    return np.minimum(1, s.astype(np.float64) * low)


def select_in_pytorch(monkeypatch):
    """The Triton kernels' steps draw as the PyTorch ones do, from the generator, row by row."""

    def select_on_device(scores, config, k, generator, *, filled=None, taken=None, **_):
        scores = torch.ones(taken.shape, device=taken.device) if scores is None else scores
        selection = select(scores, config, k, generator)
        dispatch.mark(selection, filled, taken)
        return dispatch.SelectionOnDevice(selection, None)

    monkeypatch.setattr(dispatch, "select_on_device", select_on_device)
    monkeypatch.setattr(dispatch, "seed_of_selection", lambda *_: NOT_DRAWN)
    monkeypatch.setattr(native, "choose", lambda *_, **__: None)


def share_among_programs(monkeypatch):
    """The kernels for many units run on few: 64 a program, of which it holds 32 at a time."""
    monkeypatch.setattr(kernels, "ONE_PROGRAM", 1)
    monkeypatch.setattr(select_shared, "SHARE", 64)
    monkeypatch.setattr(select_shared, "CHUNK", 32)


def check_selection(policy, block_rows=1, dtype=torch.float16, device="cpu"):
    """Rows, weights, factors for rows of `dtype` and flags of one selection among 203 rows.

    The last row that `topk` takes is one of several with the same score.
    """
    scores = torch.randn(203, device=device).exp()
    scores[::9] = 2.5
    scores[7], scores[100] = torch.nan, torch.inf
    k = 40 // block_rows
    filled = torch.ones(203, dtype=torch.bool, device=device)
    taken = ~filled
    rows, weights, factors = kernels.select(
        scores, k, policy, torch.tensor([SEED], device=device),
        block_rows=block_rows, dtype=dtype, filled=filled, taken=taken,
    )  # fmt: skip
    good = expected(scores, k, policy, SEED, block_rows)
    assert torch.equal(rows, good.indices)
    torch.testing.assert_close(weights, good.weights)
    assert torch.equal(taken.nonzero()[:, 0], rows[rows < 203])
    assert torch.equal(filled, ~taken)
    scale = 1 if factors.scale is None else factors.scale
    torch.testing.assert_close(
        factors.factors * scale, weights, rtol=2**-8, atol=0, check_dtype=False
    )


def check_bernoulli(device="cpu"):
    """Rows and weights of what is drawn by probabilities, among padding of weight 0."""
    scores = torch.randn(203, device=device).exp()
    rows, weights, _ = kernels.select(scores, 40, "bernoulli", torch.tensor([SEED], device=device))
    good = expected(scores, 40, "bernoulli", SEED)
    assert torch.equal(rows[weights > 0], good.indices)
    torch.testing.assert_close(weights[weights > 0], good.weights)
    assert (rows.diff() > 0).all()
