"""Row scores and the memory's update as compiled: bfloat16, its random rounding, bounds, races."""

import pytest
import torch

from memaop_triton.kernels.gpu.score import accumulate_and_score, accumulate_rest, row_scores
from memaop_triton.kernels.tuning.config import RowConfig
from tests.judging import as_good_as, laid_out, operands

pytestmark = pytest.mark.parametrize("gpu", [80], indirect=True, ids=["sm_80"])
TILE = RowConfig(8, 16, 4)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def cuda(value, dtype=torch.float32):
    return torch.tensor([value], dtype=dtype, device="cuda")


def seeded(number):
    return cuda(number, torch.int64)


def norms(a, dtype=torch.float64):
    return torch.linalg.vector_norm(a.to(dtype), dim=1)


@pytest.mark.parametrize("layout", ["plain", "transposed", "padded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores(dtype, layout):
    x, g = operands(21, 33, 17, dtype, layout, device="cuda")
    x[3, 2], g[5, 16], x[6], g[6, 0] = torch.nan, -torch.inf, 0.0, torch.inf
    scores, _ = row_scores(x, g, config=TILE)
    good = torch.ones(21, dtype=torch.bool).index_fill(0, torch.tensor([3, 5, 6]), False)
    assert (scores[~good] == torch.inf).all()
    f32 = torch.float32
    as_good_as(scores[good], (norms(x, f32) * norms(g, f32))[good], (norms(x) * norms(g))[good])


def test_column_sums():
    x, g = operands(21, 33, 17, torch.bfloat16, device="cuda")
    _, sums = row_scores(x, g, bias_grad=True, config=TILE)
    as_good_as(sums, g.sum(0), g.double().sum(0))


def new_memory(rows, n, p, dtype):
    filled = torch.arange(rows, device="cuda") % 2 == 0
    halves = operands(rows, n, p, dtype, "padded", device="cuda")
    for half in halves:
        half[~filled] = torch.nan
    return (*halves, filled)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("memory_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_update(dtype, memory_dtype, signed):
    """Each |element| is off by one rounding at most, and the scores are those of what is stored."""
    x, g = operands(21, 33, 17, dtype, device="cuda")
    memory = new_memory(21, 33, 17, memory_dtype)
    old = [torch.where(memory[2][:, None], m.double(), 0.0) for m in memory[:2]]
    scores, sums = accumulate_and_score(
        memory, x, g, cuda(0.75), seeded(5), signed=signed, bias_grad=True, config=TILE
    )
    unit = torch.finfo(memory_dtype).eps
    flipped = []
    for m, before, a in zip(memory, old, (x, g), strict=False):
        plus, minus = a.double() + 0.75 * before, a.double() - 0.75 * before
        close = [(m.double() - right).abs() <= unit * right.abs() + 1e-6 for right in (plus, minus)]
        assert (close[0].all(1) | close[1].all(1)).all()
        flipped.append(~close[0].all(1))
    assert torch.equal(*flipped)
    assert bool(flipped[0].any()) == signed
    assert memory[2].all()
    mx, mg, _ = memory
    as_good_as(scores, norms(mx, torch.float32) * norms(mg, torch.float32), norms(mx) * norms(mg))
    as_good_as(sums, g.sum(0), g.double().sum(0))


@pytest.mark.parametrize("bias_grad", [False, True])
def test_update_of_the_rest(bias_grad):
    x, g = operands(21, 33, 17, torch.bfloat16, device="cuda")
    taken = torch.arange(21, device="cuda") % 3 == 0
    x[3, 5], g[6, 2] = torch.nan, torch.inf  # both taken
    memory, lost = new_memory(21, 33, 17, torch.bfloat16), cuda(0.0)
    before = [m.clone() for m in memory]
    options = {"bias_grad": bias_grad, "config": TILE}
    accumulate_rest(memory, x, g, cuda(0.75), seeded(5), taken, lost, **options)
    assert lost == 0
    for m, old in zip(memory[:2], before, strict=False):
        torch.testing.assert_close(m[taken], old[taken], rtol=0, atol=0, equal_nan=True)
        assert m[~taken].isfinite().all()
    assert torch.equal(memory[2], before[2] | ~taken)
    g[7, 16] = torch.nan
    accumulate_rest(memory, x, g, cuda(0.75), seeded(5), taken, lost, **options)
    assert lost.isnan()
    assert not memory[2][7]


def rounded(value, seeds, rows=8):
    """What a bfloat16 memory makes of float32 numbers under each seed: [seeds, rows, columns]."""
    results = []
    for seed in seeds:
        memory = tuple(torch.empty(rows, value.shape[1], device="cuda").bfloat16() for _ in "xg")
        flags = torch.zeros(rows, dtype=torch.bool, device="cuda")
        x = value.expand(rows, -1)
        accumulate_and_score((*memory, flags), x, x, cuda(1.0), seeded(seed), config=TILE)
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


def test_what_bfloat16_holds_is_not_changed():
    value = torch.randn(1, 48, device="cuda").bfloat16().float()
    value[0, :5] = torch.tensor([0.0, -0.0, 2.0**-133, 3.38953139e38, -1.0])
    assert (rounded(value, range(10)) == value).all()


def test_what_is_not_finite_keeps_its_kind():
    payload = torch.tensor([0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    bad = torch.cat([torch.tensor([torch.nan, torch.inf, -torch.inf]), payload]).cuda()
    results = rounded(bad[None], range(4))
    assert results[..., [0, 3, 4]].isnan().all()
    assert (results[..., 1] == torch.inf).all()
    assert (results[..., 2] == -torch.inf).all()


def test_memory_around_the_slots_is_left_alone():
    whole = laid_out(torch.zeros(21, 33, device="cuda"), "plain")
    part = whole[3:12, 4:21]
    memory = (part, torch.zeros(9, 9, device="cuda"), torch.ones(9, device="cuda").bool())
    x, g = operands(9, 17, 9, torch.bfloat16, device="cuda")
    accumulate_and_score(memory, x, g, cuda(1.0), seeded(5), config=TILE)
    assert torch.equal(part, x.float())
    part.zero_()
    assert (whole == 0).all()
