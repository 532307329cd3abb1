"""The choice among scored rows in C is PyTorch's."""

import pytest
import torch

from memaop_triton import selection
from memaop_triton.kernels.cpu import native
from tests.compiled import needs_compiler
from tests.pairwise import pairwise

NUMBERS = [torch.float32, torch.float64]


@needs_compiler
@pytest.mark.parametrize(
    ("sizes", "kind", "dtype"),
    pairwise(
        [(2, 1), (17, 16), (500, 3), (5000, 625)],
        ["normal", "wide", "zeros", "infinite", "all infinite", "nan"],
        NUMBERS,
    ),
)
def test_it_selects_what_pytorch_selects(sizes, kind, dtype):
    count, k = sizes
    scores = torch.rand(count, dtype=dtype)
    if kind == "wide":
        scores = (20 * torch.randn(count, dtype=dtype)).exp().clamp(max=1e30)
    elif kind == "zeros":
        scores[torch.rand(count) < 0.9] = 0
    elif kind != "normal":
        bad = torch.ones(count) if kind == "all infinite" else torch.rand(count) < 0.01
        scores[bad.bool()] = torch.nan if kind == "nan" else torch.inf
    uniform = torch.rand(count, dtype=dtype)
    indices, weights = native.choose(scores, k, uniform)
    assert (indices.diff() > 0).all()
    assert ((indices >= 0) & (indices < count)).all()
    finite = scores.nan_to_num(torch.inf, torch.inf)
    theirs, their_weights = selection._priority(finite, 1 - uniform, k)
    order = theirs.argsort()
    # Rows of weight 0 fill up to K, and any of them will do.
    found, expected = weights > 0, their_weights[order] > 0
    assert torch.equal(indices[found], theirs[order][expected])
    assert torch.equal(weights[found], their_weights[order][expected])
    largest, ones = native.choose(scores, k)
    assert torch.equal(finite[largest].sort().values, finite.topk(k).values.flip(0))
    assert (largest.diff() > 0).all()
    assert torch.equal(ones, torch.ones(k, dtype=dtype))


@needs_compiler
@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize(
    ("scores", "drawn", "expected"),
    [
        ([1.0] * 9, True, [0, 1, 2, 3]),  # of equal ones the first
        ([1.0] * 9, False, [0, 1, 2, 3]),
        ([1.0, torch.nan, 3.0, torch.inf, 0.0], False, [0, 1, 2, 3]),  # NaN before all
        ([1.0, torch.nan, 3.0, torch.inf, 0.0, 2.0, 4.0], False, [1, 2, 3, 6]),
        ([3.0, -0.0, 2.0, 1.0, -0.0, 5.0], True, [0, 2, 3, 5]),  # a zero has no sign
        ([3.0, -0.0, 2.0, 1.0, -0.0, 5.0], False, [0, 2, 3, 5]),
    ],
)
def test_ties_and_special_numbers(scores, drawn, expected, dtype):
    scores = torch.tensor(scores, dtype=dtype)
    indices, weights = native.choose(scores, 4, torch.zeros_like(scores) if drawn else None)
    assert indices.tolist() == expected
    assert weights.tolist() == [1, 1, 1, 1]


def test_the_default_device_is_nobodys_device(way):
    scores = torch.rand(40, device="cpu")
    torch.set_default_device("meta")
    try:
        indices = selection.select_rows(scores, 5, "topk").indices
    finally:
        torch.set_default_device(None)
    assert torch.equal(indices.sort().values, scores.topk(5).indices.sort().values)
