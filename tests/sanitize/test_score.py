"""Row scores and the memory's update as compiled: bfloat16, its random rounding, bounds, races."""

import pytest
import torch

from memaop_triton.backward.scores import columns_of
from memaop_triton.kernels.gpu.rescale import rescale_
from memaop_triton.kernels.gpu.score import accumulate_and_score, row_scores
from tests.judging import operands
from tests.kernel_checks import (
    TILE,
    check_norms,
    check_rows_that_are_not_finite,
    check_sums,
    check_update,
    check_update_of_the_rest,
    scalar,
)

pytestmark = pytest.mark.parametrize("gpu", [80], indirect=True, ids=["sm_80"])
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("layout", ["plain", "transposed", "padded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_finite(dtype, layout):
    check_rows_that_are_not_finite(dtype, layout, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_blocks_of_columns(dtype):
    x, g = operands(21, 700, 200, dtype, device="cuda")
    x, part = columns_of(x, 3), columns_of(g, 1)
    check_norms(row_scores(x, part)[0], x.flatten(1), part.flatten(1))
    for other in (x, None):
        scores, sums = row_scores(other, g, bias_grad=True, config=TILE)
        check_norms(scores, *([] if other is None else [x.flatten(1)]), g)
        check_sums(sums, g)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_update(dtype, stored, signed):
    check_update((21, 33, 17), dtype, stored, signed=signed, device="cuda")


@pytest.mark.parametrize("bias_grad", [False, True])
def test_update_of_the_rest(bias_grad):
    dtype = torch.bfloat16
    check_update_of_the_rest(dtype, dtype, bias_grad=bias_grad, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 0.5, 4.0])
def test_rescaling_by_powers_of_two_is_exact(dtype, factor):
    m = torch.randn(21, 33, device="cuda").to(dtype)
    expected = m.clone() * factor
    rescale_(m, scalar(factor, "cuda"), config=TILE)
    assert torch.equal(m, expected)


def rounded(value, seeds, rows=8):
    """What a bfloat16 memory makes of float32 numbers under each seed: [seeds, rows, columns]."""
    results = []
    for seed in seeds:
        memory = tuple(torch.empty(rows, value.shape[1], device="cuda").bfloat16() for _ in "xg")
        flags = torch.zeros(rows, dtype=torch.bool, device="cuda")
        x = value.expand(rows, -1)
        numbers = scalar(1.0, "cuda"), scalar(seed, "cuda")
        accumulate_and_score((*memory, flags), x, x, *numbers, config=TILE)
        results += memory
    return torch.stack(results).float()


def test_rounding_is_to_a_neighbour_and_right_on_average():
    value = torch.randn(1, 48, device="cuda") * torch.logspace(-30, 30, 48)
    value[0, :4] = torch.tensor([1.0 + 2**-8, 1.0 + 2**-9, -1.0 - 2**-15, 2**-127 + 2**-135])
    results = rounded(value, range(100, 120))
    bits = value.view(torch.int32)
    below = (bits & -65536).view(torch.float32)
    above = ((bits & -65536) + 65536).view(torch.float32)
    assert ((results == below) | (results == above)).all()
    chance = ((value.double() - below.double()) / (above.double() - below.double())).squeeze()
    draws = (results == above).double().flatten(0, 1)
    error_bar = (chance * (1 - chance) / len(draws)).sqrt()
    assert ((draws.mean(0) - chance).abs() <= 4.5 * error_bar + 1e-9).all()
    # No two of X, G, the rows and the columns share their noise.
    ups = (results == above).double().sum(2)
    spread = (chance * (1 - chance)).sum()
    assert 0.6 < ups.var() / spread < 1.6


def test_noise_differs_between_matrices_and_seeds():
    value = torch.full((1, 48), 1.0 + 2**-8, device="cuda")
    up = (rounded(value, (1, 2)) > 1.0).flatten(1).double() * 2 - 1
    likeness = (up @ up.T / up.shape[1]).fill_diagonal_(0)
    assert likeness.abs().max() < 4.5 / up.shape[1] ** 0.5
    assert torch.equal(rounded(value, (1,)), rounded(value, (1,)))


def test_what_bfloat16_holds_is_not_changed_and_what_is_not_finite_keeps_its_kind():
    value = torch.randn(1, 48, device="cuda").bfloat16().float()
    value[0, :5] = torch.tensor([0.0, -0.0, 2.0**-133, 3.38953139e38, -1.0])
    value[0, 5:8] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    value[0, 8:10] = torch.tensor([0x7F800001, -1], dtype=torch.int32).view(torch.float32)  # NaN
    results = rounded(value, range(10))
    torch.testing.assert_close(results, value.expand_as(results), rtol=0, atol=0, equal_nan=True)
