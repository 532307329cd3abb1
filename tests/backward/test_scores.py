"""Scores that read a part of the rows: which part, that no row is lost, and what they cost."""

import copy
import pickle

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from memaop_triton import MemAOPConfig, MemAOPLinear, memaop_linear
from memaop_triton.backward import scores
from memaop_triton.backward.input_grad import select_for_both
from memaop_triton.backward.scores import columns_of, parts_to_score, with_floor
from memaop_triton.backward.step import Operands
from memaop_triton.backward.weight_grad import weight_and_bias_grad, weight_grad
from memaop_triton.config import SCORES
from memaop_triton.flops import SCORED_BLOCK as BLOCK
from memaop_triton.flops import columns_read
from memaop_triton.kernels.cpu import torch_ops
from memaop_triton.monitor.estimates import Figures
from memaop_triton.monitor.observer import LayerObserver
from memaop_triton.sampling.variance import variance_curve
from tests.pairwise import pairwise
from tests.schemes import UNBIASED

ROWS, WIDE, NARROW = 40, 256, 5
CHEAP = SCORES[1:]


def blocks_of(part):
    """Numbers of the blocks that a part of a matrix of column numbers holds."""
    return (part[0].flatten() // BLOCK).unique().tolist()


@pytest.mark.parametrize("columns", [128, 200, 384, 784, 1000, 1024, 4096])
def test_an_eighth_of_the_columns_is_read_and_all_in_turn(columns):
    a = torch.arange(columns).expand(3, columns)
    found = [columns_of(a, seed) for seed in range(64)]
    count = columns_read(columns) // BLOCK
    assert count == max(1, round(columns / 512))
    for seed, part in enumerate(found):
        assert part.shape == (3, count, BLOCK)
        assert part.untyped_storage().data_ptr() == a.untyped_storage().data_ptr()
        assert torch.equal(part, part[:, :, :1] + torch.arange(BLOCK)), "blocks are whole"
        assert torch.equal(columns_of(a, torch.tensor([seed])), part)
    seen = sorted({block for part in found for block in blocks_of(part)})
    assert seen == list(range(len(seen)))
    assert len(seen) > columns // BLOCK - count


def test_narrow_rows_are_read_whole_and_their_zeros_are_not_drawn():
    x, g = torch.randn(ROWS, 127), torch.randn(ROWS, 90)
    assert all(map(torch.equal, parts_to_score("columns", x, g), (x, g)))
    g[8:] = 0
    config = MemAOPConfig(k=8, memory=None, scores="columns")
    torch.testing.assert_close(weight_grad(x, g, config), g.t() @ x)


def test_the_columns_change_with_the_step_and_are_repeated_with_the_generator(generator):
    a = torch.arange(1024).expand(2, 1024)
    first, again = ([], [])
    for found, ours in ((first, generator(1)), (again, generator(1))):
        for _ in range(40):
            parts = parts_to_score("columns", a, a, ours)
            found.append(tuple(map(blocks_of, parts)))
    assert first == again
    assert len({x[0] for x, _ in first}) == len({g[0] for _, g in first}) == 8
    assert any(x != g for x, g in first), "X and G have places of their own"


def test_the_floor_is_above_zero_and_leaves_most_to_the_scores():
    raised = with_floor(torch.tensor([0.0, 1.0, 3.0, 0.0]))
    torch.testing.assert_close(raised, torch.tensor([0.1, 1.1, 3.1, 0.1]))
    assert torch.equal(with_floor(torch.zeros(3)), torch.full((3,), 1e-30))
    tiny = with_floor(torch.tensor([0.0, 2e-20]))
    torch.testing.assert_close(tiny, torch.tensor([1e-21, 2.1e-20]), rtol=1e-6, atol=0)
    some = with_floor(torch.tensor([torch.inf, torch.nan, 2.0, 0.0]))
    assert (some[0], some[1].isnan().item()) == (torch.inf, True)
    torch.testing.assert_close(some[2:], torch.tensor([2.05, 0.05]))


@pytest.fixture
def sparse():
    """Rows that are zero but for one block of columns, of X in one half and of G in the other."""

    def make(inputs, outputs):
        x, g = (torch.randn(ROWS, n, dtype=torch.float64) for n in (inputs, outputs))
        for a, rows in ((x, range(ROWS // 2)), (g, range(ROWS // 2, ROWS))):
            for row in rows if a.shape[1] >= 2 * BLOCK else ():
                block = row % (a.shape[1] // BLOCK)
                a[row, : block * BLOCK] = 0
                a[row, (block + 1) * BLOCK :] = 0
        return x, g

    return make


@pytest.mark.parametrize(
    ("unbiased", "kind", "sizes", "block_rows"),
    pairwise(UNBIASED, CHEAP, [(WIDE, NARROW), (NARROW, WIDE)], [1, 16]),
)
def test_mean_is_dense_though_rows_are_zero_where_they_are_read(
    unbiased, kind, sizes, block_rows, sparse, mean_agrees
):
    config = MemAOPConfig(k=10, memory=None, scores=kind, block_rows=block_rows, **unbiased)
    x, g = sparse(*sizes)
    draws = [weight_grad(x, g, config) for _ in range(600)]
    mean_agrees(draws, g.T @ x)


@pytest.mark.parametrize(("unbiased", "kind"), pairwise(UNBIASED, CHEAP))
def test_both_gradients_are_dense_in_the_mean_with_a_sampled_input_gradient(
    unbiased, kind, sparse, mean_agrees
):
    config = MemAOPConfig(k=10, memory=None, grad_input="sampled", scores=kind, **unbiased)
    x, g = sparse(NARROW, WIDE)
    x.requires_grad_()
    w = torch.randn(WIDE, NARROW, dtype=torch.float64, requires_grad=True)
    pairs = [torch.autograd.grad(memaop_linear(x, w, None, config), (x, w), g) for _ in range(600)]
    dx, dw = zip(*pairs, strict=True)
    mean_agrees(dx, g @ w.detach())
    mean_agrees(dw, g.T @ x.detach())


def rows_drawn(config, x, g, selections):
    selections.clear()
    torch.manual_seed(3)
    weight_grad(x, g, config)
    return selections[0]


def test_scores_of_the_gradient_do_not_read_x(selections):
    config = MemAOPConfig(k=10, memory=None, scores="grad")
    x, g = torch.randn(ROWS, WIDE), torch.randn(ROWS, WIDE)
    before = rows_drawn(config, x, g, selections)
    after = rows_drawn(config, x * torch.rand(ROWS, 1), g, selections)
    assert all(map(torch.equal, before, after))
    louder = torch.ones(ROWS, 1).index_fill_(0, torch.tensor([7]), 1e6)
    assert 7 in rows_drawn(config, x, g * louder, selections).indices
    assert 7 not in rows_drawn(config, x * louder, g / louder, selections).indices


def test_columns_that_are_not_read_change_nothing(selections, monkeypatch):
    config = MemAOPConfig(k=10, memory=None, scores="columns")
    monkeypatch.setattr(scores, "draw_seed", lambda *_: 1)  # the second block of X, the first of G
    x, g = torch.randn(ROWS, WIDE), torch.randn(ROWS, WIDE)
    before = rows_drawn(config, x, g, selections)
    x[:, :64], x[:, 128:], g[:, 64:] = 1e3, torch.rand(ROWS, 1), 7.0
    assert all(map(torch.equal, before, rows_drawn(config, x, g, selections)))
    x[5, 64:128] = 1e9
    assert 5 in rows_drawn(config, x, g, selections).indices


def test_whole_rows_of_g_are_scored_where_they_are_read_anyway():
    x, g = torch.randn(ROWS, WIDE), torch.randn(ROWS, WIDE)
    part, whole = parts_to_score("columns", x, g, whole_grad=True)
    assert part.shape == (ROWS, 1, BLOCK)
    assert whole is g


@pytest.mark.parametrize("kind", CHEAP)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_shows_if_it_is_read(kind, bad):
    config = MemAOPConfig(k=1, memory=None, scores=kind)
    for _ in range(20):
        x, g = torch.randn(ROWS, WIDE), torch.randn(ROWS, WIDE)
        g[11] = bad
        assert not weight_grad(x, g, config).isfinite().all()


def test_one_that_is_not_read_is_in_db_and_gets_no_row_drawn(monkeypatch, selections):
    monkeypatch.setattr(scores, "draw_seed", lambda *_: 0)
    config = MemAOPConfig(k=5, memory=None, scores="columns", selection="topk")
    x, g = torch.randn(ROWS, WIDE), torch.randn(ROWS, WIDE)
    g[11] *= 1e-3
    g[11, -1] = torch.nan
    dw, db = weight_and_bias_grad(x, g, config)
    assert 11 not in selections[0].indices
    assert dw.isfinite().all()
    assert db.isnan().nonzero().tolist() == [[WIDE - 1]]


@pytest.mark.parametrize("kind", SCORES)
def test_an_observer_is_told_the_norms_of_whole_rows(kind):
    config = MemAOPConfig(k=10, memory=None, scores=kind)
    x, g = (torch.randn(ROWS, WIDE, dtype=torch.float64) for _ in "xg")
    observer = LayerObserver(1, 0.0, x.device)
    weight_and_bias_grad(x, g, config, observer=observer)
    norms = x.norm(dim=1) * g.norm(dim=1)
    sums, _ = observer.read()
    torch.testing.assert_close(sums[Figures._fields.index("score_sum")], norms.sum())
    curve = sums[len(Figures._fields) : -1]
    torch.testing.assert_close(curve, variance_curve(norms).flatten())


def test_shards_raise_the_scores_of_whole_rows(monkeypatch):
    """A part of the columns may be zero in one process alone."""

    class Shards:
        def all_reduce_scores(self, part):
            return part + torch.tensor([4.0, 0.0, 0.0, 0.0])

    config = MemAOPConfig(k=1, memory=None, scores="columns")
    x = torch.ones(4, 128)
    shared = Operands(x, x, config, 1, shards=Shards())
    torch.testing.assert_close(
        shared.scores_of_whole_rows(torch.tensor([0.0, 4.0, 0.0, 0.0])),
        torch.tensor([4.2, 4.2, 0.2, 0.2]),
    )
    plain = shared._replace(config=MemAOPConfig(k=1, memory=None, scores="grad"), shards=None)
    assert (plain.scores_of_whole_rows(torch.zeros(4)) == 0).all()


def test_x_is_read_for_rows_that_are_not_finite_with_whole_norms_alone():
    x, g = torch.randn(ROWS, NARROW), torch.randn(ROWS, NARROW)
    x[9], g[9] = torch.nan, 1e-9
    for kind in SCORES:
        config = MemAOPConfig(k=4, memory=None, grad_input="sampled", scores=kind)
        drawn = select_for_both(x, g, config, 4).indices
        assert (9 in drawn) == (kind == "norms")


@pytest.mark.parametrize(
    ("kind", "numbers"), [("norms", 1024 + 200), ("columns", 128 + 64), ("grad", 200)]
)
def test_operations_and_budgets_count_what_is_read(kind, numbers):
    m, n, p = 64, 1024, 200
    layer = MemAOPLinear(n, p, config=MemAOPConfig(k=8, memory=None, scores=kind))
    y = layer(torch.randn(m, n))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 8 * n * p + 2 * m * numbers
    k = MemAOPConfig(budget=1 / 8, memory=None, scores=kind).num_rows(m, n, p)
    assert k == (2 * m * n * p // 8 - 2 * m * numbers) // (2 * n * p)


def test_scores_are_shown_and_survive_copies():
    config = MemAOPConfig(memory=None, scores="grad")
    layer = MemAOPLinear(4, 4, config=config)
    assert "scores=grad" in repr(layer)
    assert "scores" not in repr(MemAOPLinear(4, 4))
    layer.set_ratio_(1 / 2)
    assert copy.deepcopy(layer).config.scores == pickle.loads(pickle.dumps(config)).scores == "grad"
    older = MemAOPConfig(memory=None)
    del older.__dict__["scores"]  # as of a file that was written before there were any
    assert pickle.loads(pickle.dumps(older)) == MemAOPConfig(memory=None)


@pytest.mark.parametrize("backend", ["", "torch"])
def test_the_norms_of_blocks_are_those_of_their_columns(backend, monkeypatch):
    monkeypatch.setenv("MEMAOP_TRITON_BACKEND", backend)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for a in (torch.randn(33, 1100), torch.randn(1100, 33).t(), torch.ones(1).expand(33, 1100)):
            part = columns_of(a.to(dtype), 5)
            exact = part.flatten(1).double().norm(dim=1)
            norms = torch_ops.row_norms(part)
            assert norms.dtype == torch_ops.score_dtype(dtype)
            torch.testing.assert_close(norms.double(), exact, rtol=1e-6, atol=0)
