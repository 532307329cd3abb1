"""Products of selected rows agree with float64, in C and in plain PyTorch."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memaop_triton.kernels.cpu import library, native, torch_ops
from tests.compiled import KINDS, needs_compiler
from tests.pairwise import pairwise


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


@pytest.mark.parametrize(
    ("shape", "k", "rank", "weighted", "kind"),
    pairwise(
        [(16, 16), (17, 31), (96, 48), (130, 61), (64, 400), (5, 3)],
        [0, 1, 3, 255, 256, 257, 700],
        [0, 1, 5],
        [False, True],
        KINDS,
    ),
)
def test_it_agrees_with_float64(shape, k, rank, weighted, kind, way):
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
    poison = torch.full((p, n), torch.nan, dtype=dtype)
    del poison
    found = torch_ops.gather_gemm(x, g, indices, weights, projection)
    assert found.dtype == dtype
    absolute = min(2 * off, 2e-4)
    if dtype == torch.bfloat16 and way == "C" and min(n, p) >= library.LANES:
        # All sums are taken before anything is rounded to bfloat16.
        off = torch.finfo(dtype).eps
    elif dtype == torch.bfloat16:
        absolute = off * max(1, k) ** 0.5
    torch.testing.assert_close(found.double(), exact, rtol=off, atol=absolute)
    turned = torch_ops.gather_gemm(x, g, indices, weights, projection, transposed=True)
    assert turned.is_contiguous()
    torch.testing.assert_close(turned.double(), exact.t(), rtol=off, atol=absolute)


@needs_compiler
@pytest.mark.parametrize("dtype", library.DTYPES)
@pytest.mark.parametrize(("n", "p"), [(130, 61), (61, 130)])
def test_it_rounds_alike_for_any_number_of_threads(n, p, dtype, own_gemm, threads):
    operands = gemm_operands(700, n, p, 5, dtype)
    found = []
    for count in (1, 2, 3, 5):
        threads(count)
        found += [native.gather_gemm(*operands), native.gather_gemm(*operands, transposed=True).t()]
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(("dtype", "off"), KINDS)
def test_it_takes_rows_of_any_stride_and_repeats(dtype, off, way):
    x = torch.randn(50, 40, dtype=dtype)[:, 3:35]
    g = torch.randn(100, 90, dtype=dtype)[::2, 5:30]
    indices = torch.tensor([4, 4, 9, 49])
    found = torch_ops.gather_gemm(x, g, indices).double()
    exact = g[indices].double().t() @ x[indices].double()
    torch.testing.assert_close(found, exact, rtol=off, atol=off)


@needs_compiler
@pytest.mark.parametrize("index", [-1, 30])
def test_it_reads_nothing_outside(index, own_gemm):
    with pytest.raises(IndexError, match=r"indices of x must be in \[0, 30\)"):
        native.gather_gemm(torch.randn(30, 16), torch.randn(30, 16), torch.tensor([0, index]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_it_spoils_what_the_row_reaches_and_nothing_else(value, way):
    x, g, indices, weights, _ = gemm_operands(300, 50, 40, 0)
    x[indices[7], 49] = value
    found = torch_ops.gather_gemm(x, g, indices, weights).isfinite()
    assert not found[:, 49].any()
    assert found[:, :49].all()


@needs_compiler
def test_it_keeps_its_room_within_bounds(own_gemm, monkeypatch):
    library._kept.__dict__.clear()
    native.gather_gemm(*gemm_operands(300, 64, 64, 0))
    kept = library._kept.room
    native.gather_gemm(*gemm_operands(300, 32, 32, 0))
    assert library._kept.room is kept
    monkeypatch.setattr(library, "_MOST_KEPT", kept.numel())
    native.gather_gemm(*gemm_operands(300, 512, 512, 0))
    assert library._kept.room is kept


@needs_compiler
def test_it_leaves_other_dtypes_and_small_results_alone(own_gemm):
    indices = torch.arange(4)
    assert native.gather_gemm(*torch.randn(2, 9, 16, dtype=torch.float16), indices) is None
    assert native.gather_gemm(torch.randn(9, 16), torch.randn(9, 16).bfloat16(), indices) is None
    assert native.gather_gemm(torch.randn(9, 15), torch.randn(9, 64), indices) is None


def test_sampled_rows_of_float16_keep_its_range():
    g, w = torch.full((4, 8), 5e3).half(), torch.full((8, 3), 1e-2).half()
    dx = torch_ops.sampled_rows_mm(g, w, torch.tensor([0, 2]), torch.tensor([100.0, 30.0]))
    exact = torch.tensor([4e4, 0, 1.2e4, 0]).unsqueeze(1).expand(4, 3)
    torch.testing.assert_close(dx.float(), exact, rtol=2e-3, atol=0)


def test_sampled_rows_named_twice_are_added():
    g, w = torch.randn(7, 3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    weights = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)
    expected = torch.zeros(7, 5, dtype=torch.float64)
    expected[2], expected[4] = 2.5 * (g[2] @ w), g[4] @ w
    result = torch_ops.sampled_rows_mm(g, w, torch.tensor([2, 2, 4]), weights)
    torch.testing.assert_close(result, expected)


def test_sampled_rows_are_not_added_by_atomics():
    """Elsewhere than on a CPU `index_add_` may add a row's parts in any order."""
    called = {}

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called[func.overloadpacket] = args[3:]
            return func(*args, **(kwargs or {}))

    operands = torch.ones(6, 4), torch.ones(4, 3), torch.tensor([2, 2, 4])
    with Operations():
        torch_ops.sampled_rows_mm(*(operand.to("meta") for operand in operands))
    assert torch.ops.aten.index_add_ not in called
    # With `accumulate`, so that a row named twice is added twice.
    assert called[torch.ops.aten.index_put_] == (True,)
