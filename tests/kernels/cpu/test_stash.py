"""Rows in a few bits: restored in the mean, by C and by PyTorch, with every shape and layout."""

import math

import pytest
import torch

from memaop_triton.kernels.cpu.stash import (
    Inside,
    bytes_of_row,
    restore_rows,
    round_rows,
    widths,
)
from tests.compiled import needs_compiler
from tests.kernels.cpu.test_passes import DTYPES, STRIDES
from tests.pairwise import pairwise

COLUMNS = [1, 2, 3, 16, 64, 80, 127, 200]
MOST = {4: 7, 8: 127}
BITS = tuple(MOST)


def hadamard(width):
    """By its definition: signs by the parity of common bits, over the root."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(width)] for i in range(width)]
    return torch.tensor(signs, dtype=torch.float64) / math.sqrt(width)


def rotated(a):
    """The blocks of the rows of `a`, multiplied with Hadamard matrices."""
    blocks = a.double().split(widths(a.shape[1]), 1)
    return [block @ hadamard(block.shape[1]) for block in blocks]


def both_ways(x, bits, inside=None):
    stored = round_rows(x, bits, inside)
    return stored, restore_rows(stored, bits, x.shape[1], x.dtype, inside=inside)


@pytest.mark.parametrize(
    ("columns", "bits", "dtype", "stride"), pairwise(COLUMNS, BITS, DTYPES, STRIDES)
)
def test_no_number_is_off_by_more_than_half_a_step(columns, bits, dtype, stride, way):
    x = STRIDES[stride](torch.randn(37, columns).to(dtype))
    stored, restored = both_ways(x, bits)
    assert stored.numbers.shape == (37, bytes_of_row(columns, bits))
    rounding = 2 * torch.finfo(dtype).eps
    # In the dtype of x, and back, after the rotation.
    for exact, ours, scale in zip(
        rotated(x), rotated(restored), stored.scales.double().T, strict=True
    ):
        largest = exact.abs().amax(1)
        assert (scale >= largest / MOST[bits] * (1 - rounding)).all()
        assert (scale <= largest / MOST[bits] * (1 + 2**-7) * (1 + rounding)).all()
        slack = rounding * exact.shape[1] * largest
        assert ((ours - exact).abs() <= (scale / 2 + slack)[:, None]).all()
    norms = torch.linalg.vector_norm(restored.double(), dim=1)
    torch.testing.assert_close(stored.norms.double(), norms, rtol=4 * rounding, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [3, 64, 80])
def test_the_mean_is_the_row(columns, bits, way, mean_agrees):
    x = torch.randn(5, columns, dtype=torch.float64)
    mean_agrees([both_ways(x, bits)[1] for _ in range(300)], x)


@pytest.mark.parametrize("bits", BITS)
def test_draws_of_different_places_have_nothing_in_common(bits, way):
    """Rows that are equal are rounded each for itself, and so are columns."""
    rows = 4000
    x = torch.randn(192, dtype=torch.float64).expand(rows, 192).contiguous()
    stored, restored = both_ways(x, bits)
    errors = torch.cat([block.double() for block in rotated(restored - x)], 1)
    errors /= stored.scales.double().repeat_interleave(64, 1)
    # Uniform, whatever the number is.
    assert (errors.mean(0).abs() < 5 / math.sqrt(12 * rows)).all()
    assert ((errors.square().mean(0) - 1 / 12).abs() < 5 * 0.0746 / math.sqrt(rows)).all()
    errors *= math.sqrt(12)
    between_columns = torch.corrcoef(errors.T) - torch.eye(errors.shape[1])
    assert between_columns.abs().max() < 6 / math.sqrt(rows)
    for apart in (1, 2, 3, 4, 8, 16, 64, 256):
        between_rows = (errors[apart:] * errors[:-apart]).mean()
        assert between_rows.abs() < 5 / math.sqrt(errors[apart:].numel())


@pytest.mark.parametrize("bits", BITS)
def test_a_part_inside_of_a_subspace_is_taken_out_and_put_back(bits, way, mean_agrees):
    x = torch.randn(30, 8, dtype=torch.float64) @ torch.randn(8, 80, dtype=torch.float64)
    x += 0.1 * torch.randn_like(x)
    basis = torch.linalg.svd(x, full_matrices=False).Vh[:8]
    inside = Inside((x @ basis.T).bfloat16(), basis.bfloat16())
    beside = both_ways(x, bits, inside)[1]
    assert (beside - x).norm() < 0.2 * (both_ways(x, bits)[1] - x).norm()
    mean_agrees([both_ways(x, bits, inside)[1] for _ in range(400)], x)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 80])
def test_some_rows_are_those_rows(columns, bits, way):
    x = torch.randn(50, columns)
    inside = Inside(torch.randn(50, 3).bfloat16(), torch.randn(3, columns).bfloat16())
    stored = round_rows(x, bits, inside)
    indices = torch.tensor([49, 0, 7, 7, 31])
    every = restore_rows(stored, bits, columns, x.dtype, inside=inside)
    some = restore_rows(stored, bits, columns, x.dtype, indices, inside)
    assert torch.equal(some, every[indices])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_shows_in_its_row_and_in_no_other(value, bits, way):
    x = torch.randn(9, 150)
    x[3, 70] = value
    stored, restored = both_ways(x, bits)
    finite = torch.arange(9) != 3
    assert torch.equal(stored.norms.isfinite(), finite)
    assert torch.equal(restored.isfinite().all(1), finite)
    assert restored[3, 64:128].isnan().all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_numbers(bits, dtype, way):
    info = torch.finfo(dtype)
    most = min(info.max, 2.0**120)
    x = torch.zeros(4, 70).to(dtype)
    x[1], x[2, 5], x[3, 66] = info.tiny, most / 16, -most / 16
    stored, restored = both_ways(x, bits)
    assert restored.isfinite().all()
    assert restored[0].abs().max() <= 2.0**-120
    assert stored.norms[0] < 2.0**-110
    assert restored[1].abs().max() <= max(2.0**-116, 16 * info.tiny)
    for row, column in ((2, 5), (3, 66)):
        error = (restored[row, column] - x[row, column]).abs().double()
        assert error < most / 16 / MOST[bits] * 8


@pytest.mark.parametrize("bits", BITS)
def test_no_rows(bits, way):
    stored, restored = both_ways(torch.empty(0, 70), bits)
    assert stored.norms.shape == (0,)
    assert restored.shape == (0, 70)


@needs_compiler
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_c_and_pytorch_store_and_restore_the_same(bits, columns, plain):
    x = torch.randn(40, columns, dtype=torch.float64)
    results = []
    for switch_off in (False, True):
        if switch_off:
            plain()
        torch.manual_seed(5)
        results.append(both_ways(x, bits))
    (ours, restored), (expected, also) = results
    assert torch.equal(ours.numbers, expected.numbers)
    assert torch.equal(ours.scales, expected.scales)
    assert torch.equal(ours.seed, expected.seed)
    torch.testing.assert_close((ours.norms, restored), (expected.norms, also))


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_number_is_never_rounded_beyond_what_is_stored(bits, way):
    """Here it is the scale times 7 or 127 exactly, and 16 bits decide: it would show."""
    x = torch.full((200_000, 1), float(MOST[bits]))
    restored = both_ways(x, bits)[1]
    assert (restored - x).abs().max() < 0.501
    restored = both_ways(-x, bits)[1]
    assert (restored + x).abs().max() < 0.501


@needs_compiler
@pytest.mark.parametrize("bits", BITS)
def test_threads_change_nothing(bits, threads):
    x = torch.randn(700, 400)
    results = []
    for count in (1, 2, 3):
        threads(count)
        torch.manual_seed(0)
        stored, restored = both_ways(x, bits)
        results.append((*stored, restored))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_widths_are_powers_of_two_that_fill_a_row():
    for columns in range(1, 300):
        found = widths(columns)
        assert sum(found) == columns
        assert list(found) == sorted(found, reverse=True)
        assert all(width & (width - 1) == 0 and width <= 64 for width in found)
        assert bytes_of_row(columns, 8) == columns
        assert bytes_of_row(columns, 4) == -(-columns // 2)
