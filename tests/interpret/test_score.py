"""Row scores and the row memory's update, against the formulas in float64."""

import pytest
import torch

from memaop_triton.kernels.gpu.score import (
    accumulate_and_score,
    accumulate_rest,
    row_norms,
    row_scores,
)
from memaop_triton.kernels.tuning.config import RowConfig
from tests.judging import LAYOUTS, as_good_as, laid_out, operands

TILE = RowConfig(8, 16, 4)
DTYPES = (torch.float16, torch.float32)
SHAPES = [(1, 1, 1), (3, 17, 1), (17, 3, 129), (9, 16, 32), (129, 33, 17)]
CARRY = 0.75


def exact_norms(a):
    return torch.linalg.vector_norm(a.double(), dim=1)


def torch_norms(a):
    return torch.linalg.vector_norm(a.float(), dim=1)


def seeded(number=20240229):
    return torch.tensor([number])


def new_memory(rows, n, p, dtype, filled):
    """Slots in larger matrices of NaN; those that are not filled hold NaN as well."""
    filled = torch.as_tensor(filled).expand(rows).clone()
    halves = operands(rows, n, p, dtype, "padded")
    for half in halves:
        half[~filled] = torch.nan
    return (*halves, filled)


def half_filled(rows):
    return torch.arange(rows) % 2 == 0


def expected(memory, x, g, signs=None):
    """X̂ and Ĝ from the memory as it is now: in float32, and in float64."""
    signs = torch.ones(x.shape[0]) if signs is None else signs
    factor, filled = (CARRY * signs)[:, None], memory[2][:, None]
    return [
        [
            torch.where(filled, factor * m.to(t), 0.0) + a.to(t)
            for t in (torch.float32, torch.float64)
        ]
        for m, a in zip(memory, (x, g), strict=False)
    ]


def check_memory(memory, wanted, rows=slice(None)):
    for m, (theirs, exact) in zip(memory, wanted, strict=False):
        as_good_as(m[rows], theirs[rows].to(m.dtype), exact[rows])


def signs_of(rows, seed):
    """The signs of a seed, read off an update that adds nothing."""
    ones = [torch.ones(rows, 1) for _ in range(2)]
    memory = (*ones, torch.ones(rows, dtype=torch.bool))
    zeros = torch.zeros(rows, 1)
    accumulate_and_score(
        memory, zeros, zeros, torch.ones(1), seed, signed=True, config=RowConfig(512, 16, 4)
    )
    assert torch.equal(*ones), "X and G must share their signs"
    return ones[0][:, 0]


@pytest.mark.parametrize("config", [TILE, RowConfig(16, 64, 4), None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scores(shape, dtype, config):
    x, g = operands(*shape, dtype)
    scores, sums = row_scores(x, g, bias_grad=True, config=config)
    as_good_as(scores, torch_norms(x) * torch_norms(g), exact_norms(x) * exact_norms(g))
    assert sums.dtype == dtype
    as_good_as(sums, g.sum(0), g.double().sum(0))
    assert row_scores(x, g, config=config)[1] is None
    as_good_as(row_norms(g, config=config), torch_norms(g), exact_norms(g))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_of_strided_rows(layout):
    x, g = laid_out(torch.randn(17, 33), layout), laid_out(torch.randn(17, 20).half(), layout)
    scores, sums = row_scores(x, g, bias_grad=True, config=TILE)
    as_good_as(scores, torch_norms(x) * torch_norms(g), exact_norms(x) * exact_norms(g))
    as_good_as(sums, g.sum(0), g.double().sum(0))


def test_scores_of_one_row_repeated():
    x, g = torch.randn(1, 33).expand(17, 33), torch.randn(17, 1).expand(17, 20)
    scores, _ = row_scores(x, g, config=TILE)
    as_good_as(scores, torch_norms(x) * torch_norms(g), exact_norms(x) * exact_norms(g))


def spoiled(x, g):
    """Makes some rows not finite, each in its own way; returns which."""
    x[1, 3], x[4, 0], x[5, -1] = torch.nan, torch.inf, -torch.inf
    g[6, 2], g[7, -1], g[8, 0] = torch.nan, torch.inf, -torch.inf
    x[9], g[9, 1] = 0.0, torch.inf
    g[10], x[10, 1] = 0.0, -torch.inf
    x[11, 2], g[11, 2] = torch.nan, torch.inf
    bad = torch.zeros(x.shape[0], dtype=torch.bool)
    bad[[1, 4, 5, 6, 7, 8, 9, 10, 11]] = True
    return bad


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_finite_score_infinity(dtype):
    x, g = operands(17, 20, 20, dtype)
    x[2], g[3] = 0.0, 0.0
    bad = spoiled(x, g)
    scores, _ = row_scores(x, g, config=TILE)
    assert torch.equal(scores == torch.inf, bad)
    assert (scores[2:4] == 0).all()
    assert torch.equal(row_norms(x, config=TILE) == torch.inf, ~x.isfinite().all(1))


@pytest.mark.parametrize(
    ("dtype", "memory_dtype", "signed"),
    [
        (torch.float16, torch.float16, True),
        (torch.float16, torch.float32, False),
        (torch.float32, torch.float16, False),
        (torch.float32, torch.float32, True),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_update(shape, dtype, memory_dtype, signed):
    x, g = operands(*shape, dtype)
    memory = new_memory(*shape, memory_dtype, half_filled(shape[0]))
    wanted = expected(memory, x, g, signs_of(shape[0], seeded()) if signed else None)
    scores, sums = accumulate_and_score(
        memory, x, g, torch.tensor([CARRY]), seeded(), signed=signed, bias_grad=True, config=TILE
    )
    check_memory(memory, wanted)
    assert memory[2].all()
    mx, mg, _ = memory
    as_good_as(scores, torch_norms(mx) * torch_norms(mg), exact_norms(mx) * exact_norms(mg))
    as_good_as(sums, g.sum(0), g.double().sum(0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_update_from_strided_rows(layout):
    x, g = operands(17, 33, 20, torch.float16, layout)
    memory = new_memory(17, 33, 20, torch.float32, half_filled(17))
    wanted = expected(memory, x, g)
    accumulate_and_score(memory, x, g, torch.tensor([CARRY]), seeded(), config=TILE)
    check_memory(memory, wanted)


def test_update_writes_slots_only():
    whole = torch.full((12, 32), torch.nan)
    memory = (whole[2:9, 5:22], torch.randn(7, 9), torch.ones(7, dtype=torch.bool))
    memory[0].fill_(1.0)
    flags = torch.ones(9, dtype=torch.bool)
    memory = (*memory[:2], flags[1:8])
    x, g = operands(7, 17, 9, torch.float32)
    accumulate_and_score(memory, x, g, torch.tensor([CARRY]), seeded(), config=TILE)
    assert int(whole.isfinite().sum()) == 7 * 17
    assert flags.all()


def test_flags_and_scores_of_rows_that_are_not_finite():
    x, g = operands(17, 20, 20, torch.float32)
    memory = new_memory(17, 20, 20, torch.float32, half_filled(17))
    bad = spoiled(x, g)
    scores, _ = accumulate_and_score(memory, x, g, torch.tensor([CARRY]), seeded(), config=TILE)
    assert torch.equal(scores == torch.inf, bad)
    assert torch.equal(memory[2], ~bad)


def test_a_sum_that_overflows_its_memory_is_not_kept():
    x, g = operands(5, 20, 20, torch.float32)
    x[3, 7] = 1e5
    memory = new_memory(5, 20, 20, torch.float16, False)
    scores, _ = accumulate_and_score(memory, x, g, torch.tensor([CARRY]), seeded(), config=TILE)
    assert torch.equal(scores == torch.inf, torch.arange(5) == 3)
    assert torch.equal(memory[2], torch.arange(5) != 3)


def test_signs():
    signs = signs_of(4096, seeded())
    assert torch.equal(signs.abs(), torch.ones(4096))
    assert abs(signs.mean()) < 4 / 64
    assert abs((signs[1:] * signs[:-1]).mean()) < 4 / 64
    assert torch.equal(signs, signs_of(4096, seeded()))
    assert torch.equal(signs[:100], signs_of(100, seeded())), "a sign belongs to its row alone"
    for other in (seeded().item() + 1, 7, 1 << 40, seeded().item() + (1 << 32)):
        assert abs((signs * signs_of(4096, seeded(other))).mean()) < 4 / 64


@pytest.mark.parametrize("bias_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_update_of_the_rest(dtype, bias_grad):
    x, g = operands(33, 20, 17, dtype)
    taken = torch.arange(33) % 3 == 0
    memory = new_memory(33, 20, 17, torch.float32, half_filled(33))
    before, wanted = [m.clone() for m in memory], expected(memory, x, g, signs_of(33, seeded()))
    lost = torch.zeros(1)
    sums = accumulate_rest(
        memory, x, g, torch.tensor([CARRY]), seeded(), taken, lost,
        signed=True, bias_grad=bias_grad, config=TILE,
    )  # fmt: skip
    check_memory(memory, wanted, ~taken)
    for m, old in zip(memory[:2], before, strict=False):
        torch.testing.assert_close(m[taken], old[taken], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(memory[2], before[2] | ~taken)
    assert lost == 0
    if bias_grad:
        as_good_as(sums, g.sum(0), g.double().sum(0))
    else:
        assert sums is None


@pytest.mark.parametrize("bias_grad", [False, True])
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_lost_shows(bad, where, bias_grad):
    taken = torch.arange(17) % 2 == 0
    for row in (6, 7):
        rows = operands(17, 20, 20, torch.float32)
        rows[where][row, 2] = bad
        memory, lost = new_memory(17, 20, 20, torch.float32, False), torch.zeros(1)
        carry = torch.tensor([CARRY])
        accumulate_rest(
            memory, *rows, carry, seeded(), taken, lost, bias_grad=bias_grad, config=TILE
        )
        assert bool(lost.isnan()) == (row == 7), "a row that is taken is seen elsewhere"
        assert torch.equal(memory[2], ~taken & (torch.arange(17) != row))


def test_a_memory_with_gaps_is_refused():
    x, g = operands(4, 6, 6, torch.float32)
    memory = (torch.zeros(4, 12)[:, ::2], torch.zeros(4, 6), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="gaps"):
        accumulate_and_score(memory, x, g, torch.ones(1), seeded())
