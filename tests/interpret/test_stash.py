"""Rows in a few bits: their numbers, their mean, what is moved, and layers that keep them."""

import pytest
import torch

from memaop_triton import MemAOPConfig, Subspace, dispatch, memaop_linear, new_memory
from memaop_triton.kernels.gpu import stash, stash_restore
from tests.compiled import needs_compiler
from tests.judging import LAYOUTS
from tests.kernel_checks import scalar
from tests.pairwise import pairwise
from tests.stash_checks import (
    SEED,
    check_extremes,
    check_not_finite,
    check_rounded,
    kept,
    new_subspace,
)

BITS = (4, 8)
DTYPES = (torch.float16, torch.float32)
# M, N: whole blocks, every kind of narrow ones, more rows than a program has.
SHAPES = [(37, 64), (70, 200), (5, 1), (9, 3), (40, 127), (33, 128), (20, 47), (3, 96), (65, 650)]


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "bits", "dtype", "layout", "rank"),
    pairwise(SHAPES, BITS, DTYPES, LAYOUTS, [0, 1, 17]),
)
def test_the_same_seed_stores_the_same_as_in_c(shape, bits, dtype, layout, rank):
    check_rounded(shape, bits, dtype, layout, rank=min(rank, shape[1]), compare=True)


@needs_compiler
@pytest.mark.parametrize("bits", BITS)
def test_the_seed_may_lie_on_the_device(bits):
    check_rounded((40, 100), bits, torch.float32, seed=scalar(SEED), compare=True)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of numpy, beneath `tl.max`
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_rows_that_are_not_finite(bits, dtype):
    check_not_finite(bits, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_extreme_numbers(bits, dtype):
    check_extremes(bits, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rank", [0, 3])
def test_the_mean_over_draws_is_the_row(bits, rank, mean_agrees):
    """Equal rows at different places, with a few seeds."""
    x = torch.randn(4, 80)
    rows = x.repeat(60, 1)
    expand, scale = new_subspace(80, rank)
    draws = []
    for seed in range(4):
        stored = stash.round_rows(rows, bits, SEED + seed, expand, scale)
        inside = None if rank == 0 else (stored.z, expand)
        restored = stash_restore.restore_rows(
            kept(stored, SEED + seed), bits, 80, x.dtype, None, inside
        )
        draws += restored.double().view(60, 4, 80).unbind()
    mean_agrees(draws, x.double())


@pytest.mark.parametrize("bits", BITS)
def test_no_rows(bits):
    stored = stash.round_rows(torch.empty(0, 70), bits, SEED)
    assert stored.norms.shape == (0,)
    assert stash_restore.restore_rows(kept(stored), bits, 70, torch.float32).shape == (0, 70)
    full = stash.round_rows(torch.randn(3, 70), bits, SEED)
    nothing = torch.empty(0, dtype=torch.int64)
    both = stash_restore.restore_both(kept(full), bits, 70, torch.randn(3, 5), nothing)
    assert (both.x.shape, both.g.shape) == ((0, 70), (0, 5))


@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("bits", BITS)
def test_what_is_moved(bits, rank, traffic):
    rows, n, p, k = 64, 512, 128, 16
    x, g = torch.randn(rows, n).half(), torch.randn(rows, p).half()
    expand, scale = new_subspace(n, rank)
    stored = stash.round_rows(x, bits, SEED, expand, scale)
    indices = torch.arange(0, rows, 4)
    inside = (stored.z, expand) if rank else None
    stash_restore.restore_both(kept(stored), bits, n, g, indices, torch.ones(k), inside)
    rounding, restoring = traffic
    side = {"z_ptr": 2 * rows * rank} if rank else {}
    numbers, scales = rows * n * bits // 8, 2 * rows * n // 64
    written = {"numbers_ptr": numbers, "scales_ptr": scales, "norms_ptr": 4 * rows}
    # Distinct bytes: the second walk over X finds them in the cache.
    assert rounding.read == {"x_ptr": 2 * rows * n} | ({"expand_ptr": 2 * rank * n} if rank else {})
    assert rounding.written == written | side
    part = k / rows
    read = {"numbers_ptr": numbers * part, "scales_ptr": scales * part, "g_ptr": 2 * k * p}
    read |= {"index_ptr": 8 * k, "weight_ptr": 4 * k, "seed": 8}
    read |= {"z_ptr": 2 * k * rank, "expand_ptr": 2 * rank * n} if rank else {}
    assert restoring.read == read
    assert restoring.written == {"x_ptr": 2 * k * n, "gathered_ptr": 2 * k * p}


# Layers. -----------------------------------------------------------------------------------------


@pytest.fixture
def triton(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("MEMAOP_TRITON_BACKEND", "triton")


def dense_and_ours(config, memory, dtype):
    """Gᵀ X and what a layer makes of it, whose inputs are gone in the backward pass."""
    x, g = torch.randn(40, 72).to(dtype), torch.randn(40, 9).to(dtype)
    x += torch.linspace(-1, 1, 72).to(dtype)

    def gradient():
        rows, w = x.clone(), torch.zeros(9, 72, dtype=dtype, requires_grad=True)
        out = memaop_linear(rows, w, None, config, memory)
        rows.fill_(torch.nan)
        out.backward(g)
        return w.grad

    return g.double().T @ x.double(), gradient


@pytest.mark.slow
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    ("name", "memory", "dtype"),
    [
        ("int4", None, torch.float32),
        ("int8", None, torch.float16),
        ("int4", Subspace(3, "input", 4), torch.float32),
        ("int8", Subspace(3, "grad", 4), torch.float32),
    ],
)
def test_layers_run_through_the_kernels_and_their_mean_is_dense(
    name, memory, dtype, traffic, mean_agrees
):
    config = MemAOPConfig(k=10, memory=memory, stash=name)
    exact, gradient = dense_and_ours(config, new_memory(config, 72, 9), dtype)
    draws = [gradient().double() for _ in range(24)]
    kernels = [one.kernel for one in traffic]
    assert kernels.count("stash_kernel") == 24
    assert kernels.count("restore_kernel") >= 24
    assert kernels.count("select_kernel") == 24
    if memory is not None and memory.side == "input":  # a basis comes with the first step
        assert kernels.count("combine_kernel") == 23
    if dtype == torch.float32:
        mean_agrees(draws, exact)
    else:  # whose results are rounded
        mean = torch.stack(draws).mean(0)
        assert (mean - exact).norm() < 0.5 * exact.norm()


@pytest.mark.usefixtures("triton")
def test_what_is_stored_goes_back_and_forth_between_the_backends(monkeypatch):
    x, basis = torch.randn(20, 70), torch.linalg.qr(torch.randn(70, 3)).Q
    for first, second in (("triton", "torch"), ("torch", "triton")):
        monkeypatch.setenv("MEMAOP_TRITON_BACKEND", first)
        stored, inside = dispatch.round_rows(x, 4, basis)
        arguments = stored, 4, 70, x.dtype, torch.tensor([3, 19, 3]), inside
        rows = dispatch.restore_rows(*arguments)
        monkeypatch.setenv("MEMAOP_TRITON_BACKEND", second)
        torch.testing.assert_close(dispatch.restore_rows(*arguments), rows)
        assert (rows[0] - x[3]).norm() < 0.3 * x[3].norm()


@pytest.mark.usefixtures("triton")
def test_seeds_follow_from_the_generator(generator):
    x = torch.randn(20, 70)
    first, again, other = (
        dispatch.round_rows(x, 4, None, generator(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first.numbers, again.numbers)
    assert not torch.equal(first.numbers, other.numbers)
