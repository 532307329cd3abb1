"""Row scores and the row memory's update, against the formulas in float64."""

import pytest
import torch

from memaop_triton.backward.scores import columns_of
from memaop_triton.kernels.gpu.rescale import rescale_
from memaop_triton.kernels.gpu.score import accumulate_and_score, row_norms, row_scores
from memaop_triton.kernels.tuning.config import RowConfig
from tests.judging import LAYOUTS, operands
from tests.kernel_checks import (
    CARRY,
    SEED,
    TILE,
    check_norms,
    check_rows_that_are_not_finite,
    check_sums,
    check_update,
    check_update_of_the_rest,
    new_memory,
    scalar,
    signs_of,
)
from tests.pairwise import pairwise

DTYPES = (torch.float16, torch.float32)
CONFIGS = [RowConfig(8, 16, 4), RowConfig(16, 64, 4), None]
SHAPES = [(1, 1, 1), (3, 17, 1), (17, 3, 129), (9, 16, 32), (129, 33, 17)]


@pytest.mark.parametrize(
    ("shape", "dtype", "config", "layout"), pairwise(SHAPES, DTYPES, CONFIGS, LAYOUTS)
)
def test_scores(shape, dtype, config, layout):
    x, g = operands(*shape, dtype, layout)
    scores, sums = row_scores(x, g, bias_grad=True, config=config)
    check_norms(scores, x, g)
    check_sums(sums, g)
    assert row_scores(x, g, config=config)[1] is None
    check_norms(row_norms(g, config=config), g)


@pytest.mark.parametrize(
    ("columns", "dtype", "config", "layout"),
    pairwise([(130, 3), (3, 130), (1100, 784)], DTYPES, [RowConfig(8, 16, 4), None], LAYOUTS),
)
def test_scores_of_blocks_of_columns(columns, dtype, config, layout):
    """Nothing else is read: it is NaN."""
    parts = []
    for a in operands(19, *columns, dtype, layout):
        kept = columns_of(a, 1).clone()
        part = columns_of(a if a.shape[1] < 128 else a.fill_(torch.nan), 1)
        parts.append(part.copy_(kept))
    x, g = parts
    scores, sums = row_scores(x, g, config=config)
    assert sums is None
    check_norms(scores, x.flatten(1), g.flatten(1))
    check_norms(row_norms(g, config=config), g.flatten(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_column_sums_beside_blocks_of_x_or_without_x(dtype):
    x, g = operands(19, 1100, 33, dtype)
    for part, others in ((columns_of(x, 1), [columns_of(x, 1).flatten(1)]), (None, [])):
        scores, sums = row_scores(part, g, bias_grad=True)
        check_norms(scores, *others, g)
        check_sums(sums, g)


def test_blocks_of_one_number_repeated():
    x = columns_of(torch.tensor(3.0).expand(5, 1100), 2)
    check_norms(row_norms(x), x.flatten(1))


def test_scores_of_one_row_repeated():
    x, g = torch.randn(1, 33).expand(17, 33), torch.randn(17, 1).half().expand(17, 20)
    scores, sums = row_scores(x, g, bias_grad=True, config=TILE)
    check_norms(scores, x, g)
    check_sums(sums, g)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_finite(dtype):
    check_rows_that_are_not_finite(dtype)


@pytest.mark.parametrize(
    ("shape", "layout", "dtype", "stored", "signed"),
    pairwise(SHAPES, LAYOUTS, DTYPES, DTYPES, [False, True]),
)
def test_update(shape, layout, dtype, stored, signed):
    check_update(shape, dtype, stored, signed=signed, layout=layout)


def test_update_writes_slots_only():
    whole, flags = torch.full((12, 32), torch.nan), torch.ones(9, dtype=torch.bool)
    memory = (whole[2:9, 5:22].fill_(1.0), torch.randn(7, 9), flags[1:8])
    x, g = operands(7, 17, 9, torch.float32)
    accumulate_and_score(memory, x, g, scalar(CARRY), scalar(SEED), config=TILE)
    assert int(whole.isfinite().sum()) == 7 * 17
    assert flags.all()


def test_a_sum_that_overflows_its_memory_is_not_kept():
    x, g = operands(5, 20, 20, torch.float32)
    x[3, 7] = 1e5
    memory = new_memory(5, 20, 20, torch.float16)
    scores, _ = accumulate_and_score(memory, x, g, scalar(CARRY), scalar(SEED), config=TILE)
    assert torch.equal(scores == torch.inf, torch.arange(5) == 3)
    assert torch.equal(memory[2], torch.arange(5) != 3)


def test_signs():
    signs = signs_of(4096)
    assert torch.equal(signs.abs(), torch.ones(4096, 1))
    assert abs(signs.mean()) < 4 / 64
    assert abs((signs[1:] * signs[:-1]).mean()) < 4 / 64
    assert torch.equal(signs, signs_of(4096))
    assert torch.equal(signs[:100], signs_of(100)), "a sign belongs to its row alone"
    for other in (SEED + 1, 7, 1 << 40, SEED + (1 << 32)):
        assert abs((signs * signs_of(4096, other)).mean()) < 4 / 64


@pytest.mark.parametrize("bias_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_update_of_the_rest(dtype, bias_grad):
    check_update_of_the_rest(dtype, torch.float32, bias_grad=bias_grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (17, 3), (40, 129)])
@pytest.mark.parametrize("factor", [0.5, 2.0, 0.3, 1.0])
def test_rescaling(shape, dtype, factor, traffic):
    wide = torch.randn(shape[0], shape[1] + 5).to(dtype)
    m, before = wide[:, : shape[1]], wide.clone()
    rescale_(m, scalar(factor), config=TILE)
    expected = (factor * before[:, : shape[1]].float()).to(dtype)
    torch.testing.assert_close(m, expected, rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=0)
    assert torch.equal(wide[:, shape[1] :], before[:, shape[1] :])
    assert bool(traffic[0].written) == (factor != 1)
    assert (traffic[0].read.keys() == {"factor_ptr"}) == (factor == 1)


def test_memories_with_gaps_are_refused():
    x, g = operands(4, 6, 6, torch.float32)
    memory = (torch.zeros(4, 12)[:, ::2], torch.zeros(4, 6), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="gaps"):
        accumulate_and_score(memory, x, g, torch.ones(1), scalar(SEED))
    with pytest.raises(ValueError, match=r"without gaps, got strides \(1, 40\)"):
        rescale_(torch.randn(129, 40).t(), scalar(1.0))
