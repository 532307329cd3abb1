"""Sketches of gradients, and one process by itself. Groups: `tests/distributed/auto.py`."""

import copy
import pickle

import pytest
import torch
from torch import nn

from memaop_triton import MemAOPConfig, convert_
from memaop_triton.auto import agreement
from memaop_triton.auto.agreement import SKETCH, Processes, sketch

P, N = 200, 150


def matrix(rank):
    """With as many equal singular values."""
    left, right = (torch.linalg.qr(torch.randn(side, rank))[0] for side in (P, N))
    return left @ right.T


@pytest.mark.parametrize(
    ("make", "concentration"),
    [
        (lambda: torch.outer(torch.randn(P), torch.randn(N)), 1.0),
        (lambda: matrix(10), 0.1),
        (lambda: torch.randn(P, N), 1 / P + 1 / N),
    ],
    ids=["rank 1", "rank 10", "random"],
)
def test_squares_of_sketches_have_the_error_that_is_promised(make, concentration):
    dw = make()
    count = 400
    found = torch.stack([sketch(dw, seed).square().sum() for seed in range(count)])
    found = (found / dw.square().sum()).double()
    promised = (concentration / 16 * (1 + 1 / 128) + 1 / 2048) ** 0.5
    assert found.mean() == pytest.approx(1, abs=4 * promised / count**0.5)
    # A sketch with fewer signs, or the same for both sides, has another one.
    assert 0.75 * promised < found.std() < 1.15 * promised


def test_a_single_entry_is_kept_exactly():
    """All signs are of one size."""
    dw = torch.zeros(P, N)
    dw[17, 149] = 3.0
    assert sketch(dw, 5).square().sum() == 9.0


@pytest.mark.parametrize("shape", [(40, 64), (40, 300), (300, 64), (65, 65)])
def test_small_sides_stay(shape):
    dw = torch.randn(shape, dtype=torch.float64)
    found = sketch(dw, 1)
    assert found.shape == tuple(min(side, SKETCH) for side in shape)
    assert found.dtype == torch.float64
    if max(shape) <= SKETCH:
        assert torch.equal(found, dw)


def test_sketches_of_one_seed_add_up_and_leave_the_generators_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, other = torch.ones(P, N), torch.arange(float(N)).repeat(P, 1)
    both = sketch(one, 7) + sketch(other, 7)
    torch.testing.assert_close(both, sketch(one + other, 7), rtol=1e-4, atol=1e-3)
    assert not torch.allclose(sketch(one, 7), sketch(one, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_one_process_computes_no_sketch_and_calls_no_collective(monkeypatch):
    monkeypatch.delattr(agreement.dist, "all_reduce")
    alone = Processes()
    assert alone.size == 1
    assert alone.sketcher(1) is None
    assert alone.mean([1.0, 2.0], torch.device("cpu")) == [1.0, 2.0]
    alone.check_alike("anything", torch.device("cpu"))
    assert pickle.loads(pickle.dumps(alone)).size == copy.deepcopy(alone).size == 1


def test_process_group_is_refused_where_nothing_is_decided():
    with pytest.raises(ValueError, match=r"process_group has no meaning without ratio='auto'"):
        convert_(nn.Linear(4, 4), MemAOPConfig(), process_group=object())
