"""The gather GEMM in C agrees with float64."""

import pytest
import torch

from memaop_triton.kernels.cpu import library, native, torch_ops
from tests.compiled import KINDS, needs_compiler
from tests.pairwise import pairwise


@pytest.fixture
def own_gemm(monkeypatch):
    """The GEMM of `gather_gemm.c`, whether it is the faster one on this machine or not."""
    monkeypatch.setattr(library, "prefers_own_gemm", lambda dtype: True)
    return native.gather_gemm


def gemm_operands(k, n, p, rank, dtype=torch.float32):
    rows = max(k, 1) + 40
    x, g = torch.randn(rows, n, dtype=dtype), torch.randn(rows, p, dtype=dtype)
    indices = torch.randperm(rows)[:k].sort().values
    wide = torch_ops.score_dtype(dtype)
    projection = None
    if rank:
        basis = torch.linalg.qr(torch.randn(n, n, dtype=wide)).Q[:, :rank].to(dtype)
        z = x @ basis
        projection = torch_ops.Projection(basis, z, z.to(wide).t() @ g.to(wide))
    return x, g, indices, torch.rand(k, dtype=wide) + 1, projection


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "k", "rank", "weighted", "kind"),
    pairwise(
        [(16, 16), (17, 31), (96, 48), (130, 61), (64, 400)],
        [0, 1, 3, 255, 256, 257, 700],
        [0, 1, 16],
        [False, True],
        KINDS,
    ),
)
def test_the_gather_gemm_agrees_with_float64(own_gemm, shape, k, rank, weighted, kind):
    (n, p), (dtype, off) = shape, kind
    x, g, indices, weights, projection = gemm_operands(k, n, p, rank, dtype)
    weights = weights if weighted else None
    gx, gg = x[indices].double(), g[indices].double()
    if weighted:
        gg *= weights.double()[:, None]
    if rank:
        basis, z, zg = (a.double() for a in projection)
        gx -= z[indices] @ basis.t()
    exact = gg.t() @ gx + (zg.t() @ basis.t() if rank else 0)
    found = own_gemm(x, g, indices, weights, projection)
    assert found.dtype == dtype
    # All sums are taken before anything is rounded to bfloat16.
    off = torch.finfo(dtype).eps if dtype == torch.bfloat16 else off
    torch.testing.assert_close(found.double(), exact, rtol=off, atol=min(2 * off, 2e-4))
    turned = own_gemm(x, g, indices, weights, projection, transposed=True)
    assert turned.is_contiguous()
    assert torch.equal(turned, found.t())


@needs_compiler
@pytest.mark.parametrize("dtype", [dtype for dtype, _ in KINDS])
@pytest.mark.parametrize(("n", "p"), [(130, 61), (61, 130)])
def test_the_gather_gemm_rounds_alike_for_any_number_of_threads(own_gemm, n, p, dtype):
    operands = gemm_operands(700, n, p, 5, dtype)
    found = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        try:
            found.append(own_gemm(*operands))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(found[0], other) for other in found[1:])


@needs_compiler
@pytest.mark.parametrize(("dtype", "off"), KINDS)
def test_the_gather_gemm_takes_rows_of_any_stride_and_repeats(own_gemm, dtype, off):
    x = torch.randn(50, 40, dtype=dtype)[:, 3:35]
    g = torch.randn(100, 90, dtype=dtype)[::2, 5:30]
    indices = torch.tensor([4, 4, 9, 49])
    found, exact = own_gemm(x, g, indices), g[indices].double().t() @ x[indices].double()
    torch.testing.assert_close(found.double(), exact, rtol=off, atol=off)


@needs_compiler
@pytest.mark.parametrize("index", [-1, 30])
def test_the_gather_gemm_reads_nothing_outside(own_gemm, index):
    with pytest.raises(IndexError, match=r"indices must be in \[0, 30\)"):
        own_gemm(torch.randn(30, 16), torch.randn(30, 16), torch.tensor([0, index]))


@needs_compiler
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_gather_gemm_spoils_what_the_row_reaches_and_nothing_else(own_gemm, value):
    x, g, indices, weights, _ = gemm_operands(300, 50, 40, 0)
    x[indices[7], 49] = value
    found = own_gemm(x, g, indices, weights).isfinite()
    assert not found[:, 49].any()
    assert found[:, :49].all()


@needs_compiler
def test_the_gather_gemm_keeps_its_room_within_bounds(own_gemm, monkeypatch):
    library._kept.__dict__.clear()
    own_gemm(*gemm_operands(300, 64, 64, 0))
    kept = library._kept.room
    own_gemm(*gemm_operands(300, 32, 32, 0))
    assert library._kept.room is kept
    monkeypatch.setattr(library, "_MOST_KEPT", kept.numel())
    own_gemm(*gemm_operands(300, 512, 512, 0))
    assert library._kept.room is kept


@needs_compiler
def test_the_gather_gemm_leaves_other_dtypes_and_small_results_alone(own_gemm):
    indices = torch.arange(4)
    assert own_gemm(*torch.randn(2, 9, 16, dtype=torch.float16), indices) is None
    assert own_gemm(torch.randn(9, 16), torch.randn(9, 16).bfloat16(), indices) is None
    assert own_gemm(torch.randn(9, 15), torch.randn(9, 64), indices) is None
