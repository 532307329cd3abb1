"""The compiled row passes agree with plain PyTorch."""

import functools
import weakref

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from memaop_triton import MemAOPConfig, Subspace, new_memory, selection
from memaop_triton.backward.weight_grad import weight_grad
from memaop_triton.kernels.cpu import library, native, torch_ops
from tests.compiled import KINDS, needs_compiler
from tests.pairwise import pairwise
from tests.schemes import flat_config


@pytest.fixture
def plain(monkeypatch):
    """Switches the compiled row passes off from the moment it is called."""
    return lambda: monkeypatch.setattr(library, "_library", lambda: None)


def both(plain, call):
    compiled = call()
    plain()
    return compiled, call()


@pytest.mark.parametrize(
    ("shape", "rank", "threads", "kind"),
    pairwise(
        [(1, 16), (9, 80), (137, 96), (300, 272), (64, 17)],
        [1, 4, 16, 20, 32, 40, 64, 65],
        [1, 2, 3],
        KINDS,
    ),
)
def test_projections_agree_with_pytorch(plain, shape, rank, threads, kind):
    (rows, columns), (dtype, off) = shape, kind
    x = torch.randn(rows, columns).to(dtype)
    basis = torch.linalg.qr(torch.randn(max(rank, columns), rank)).Q[:columns].to(dtype)
    torch.set_num_threads(threads)
    try:
        z, norms = torch_ops.project_rows(x, basis)
        product, x_norms, sums = torch_ops.project_gradient(x, z, bias_grad=True)
        again = torch_ops.transposed_mm(z, x)
    finally:
        torch.set_num_threads(1)
    assert z.dtype == sums.dtype == dtype
    assert norms.dtype == x_norms.dtype == product.dtype == torch_ops.score_dtype(dtype)
    exact, exact_z = x.double(), z.double()
    scale = torch_ops.basis_scale(columns)
    near = functools.partial(torch.testing.assert_close, check_dtype=False)
    near(scale * exact_z, exact @ basis.double(), rtol=off, atol=10 * off)
    # Only what is rounded when it is stored is as coarse as the dtype.
    fine = min(off, 1e-4)
    near(x_norms, exact.norm(dim=1), rtol=fine, atol=fine)
    near(sums, exact.sum(0), rtol=off, atol=off)
    near(product, exact_z.T @ exact, rtol=fine, atol=10 * fine)
    near(again, product)
    left = exact.square().sum(1) - (scale * exact_z).square().sum(1)
    least = exact.square().sum(1) * torch.finfo(dtype).eps
    near(norms.double().square(), left.maximum(least), rtol=2 * off, atol=2 * off * columns)
    plain()
    near(torch_ops.project_rows(x, basis)[1].square(), norms.square(), rtol=off, atol=off * columns)


def test_room_lives_until_the_call_returns(monkeypatch):
    """Where it is too large to be kept, nobody else holds it."""
    references, alive = [], []

    class Library:
        def product_room_f32(self, *sizes):
            return 64

        def transposed_product_f32(self, *arguments):
            alive.append(references[-1]() is not None)

    def room_for(kind, numbers):
        room = torch.empty(numbers, dtype=torch.uint8)
        references.append(weakref.ref(room))
        return room

    monkeypatch.setattr(native, "room_for", room_for)
    monkeypatch.setattr(native, "library_for", lambda *operands: Library())
    native.transposed_mm(torch.randn(8, 4), torch.randn(8, 16))
    assert alive == [True]


@pytest.mark.parametrize("dtype", [dtype for dtype, _ in KINDS])
@pytest.mark.parametrize("rank", [4, 16, 40])
def test_what_a_basis_leaves_of_its_own_rows_is_rounding_and_never_nothing(rank, dtype):
    basis = torch.linalg.qr(torch.randn(96, rank, dtype=torch_ops.score_dtype(dtype))).Q.to(dtype)
    rows = torch.randn(50, rank, dtype=dtype) @ basis.t()
    rest = torch_ops.project_rows(rows, basis)[1] / torch_ops.row_norms(rows)
    least = torch.finfo(dtype).eps ** 0.5
    assert rest.min() >= 0.99 * least
    assert rest.max() <= (2 if dtype == torch.bfloat16 else 10) * least


@pytest.mark.parametrize("dtype", [dtype for dtype, _ in KINDS])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (17, 3), (3, 129), (600, 64)])
def test_accumulation_agrees_with_pytorch(plain, dtype, rows, columns):
    memory, x = torch.randn(2, rows, columns, dtype=dtype)
    carry = torch.randn(rows, dtype=torch_ops.score_dtype(dtype)) * (torch.arange(rows) % 3 > 0)
    copy = memory.clone()
    norms = torch_ops.accumulate_and_score(memory, x, carry)
    plain()
    torch.testing.assert_close(norms, torch_ops.accumulate_and_score(copy, x, carry))
    torch.testing.assert_close(memory, copy)


@needs_compiler
@pytest.mark.parametrize(
    ("sizes", "kind", "dtype"),
    pairwise(
        [(2, 1), (17, 16), (500, 3), (5000, 625)],
        ["normal", "wide", "zeros", "infinite", "all infinite", "nan"],
        [torch.float32, torch.float64],
    ),
)
def test_priority_selects_what_pytorch_selects(sizes, kind, dtype):
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
    indices, weights = native.priority(scores, uniform, k)
    assert (indices.diff() > 0).all()
    assert ((indices >= 0) & (indices < count)).all()
    finite = scores.nan_to_num(torch.inf, torch.inf)
    theirs, their_weights = selection._priority(finite, 1 - uniform, k)
    order = theirs.argsort()
    # Rows of weight 0 fill up to K, and any of them will do.
    found, expected = weights > 0, their_weights[order] > 0
    assert torch.equal(indices[found], theirs[order][expected])
    assert torch.equal(weights[found], their_weights[order][expected])


@needs_compiler
def test_priority_takes_the_first_of_equal_keys():
    indices, weights = native.priority(torch.ones(9), torch.zeros(9), 4)
    assert indices.tolist() == [0, 1, 2, 3]
    assert weights.tolist() == [1, 1, 1, 1]


@needs_compiler
@pytest.mark.parametrize(("count", "k"), [(2, 1), (17, 16), (500, 3), (5000, 625)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_scores_are_selected(count, k, dtype):
    scores = torch.rand(count, dtype=dtype)
    scores[torch.rand(count) < 0.1] = 0
    indices = native.largest(scores, k)
    assert torch.equal(scores[indices].sort().values, scores.topk(k).values.flip(0))
    assert (indices.diff() > 0).all()


@needs_compiler
def test_of_equal_scores_the_first_are_selected_and_nan_before_all():
    assert native.largest(torch.ones(9), 4).tolist() == [0, 1, 2, 3]
    scores = torch.tensor([1.0, torch.nan, 3.0, torch.inf, 0.0])
    assert native.largest(scores, 3).tolist() == [1, 2, 3]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_has_no_sign(dtype):
    scores = torch.tensor([3.0, -0.0, 2.0, 1.0, -0.0], dtype=dtype)
    assert native.largest(scores, 2).tolist() == [0, 2]
    indices, weights = native.priority(scores, torch.zeros_like(scores), 2)
    assert indices.tolist() == [0, 2]
    assert weights.tolist() == [1, 1]


@pytest.mark.parametrize(("dtype", "off"), KINDS)
def test_rows_of_z_may_overlap(dtype, off):
    z, a = torch.randn(12, dtype=dtype).unfold(0, 4, 1), torch.randn(9, 32, dtype=dtype)
    product = torch_ops.transposed_mm(z, a)
    torch.testing.assert_close(product.double(), z.double().t() @ a.double(), rtol=off, atol=1e-4)


def test_the_default_device_is_nobodys_device():
    scores = torch.rand(40, device="cpu")
    torch.set_default_device("meta")
    try:
        indices = selection.select_rows(scores, 5, "topk").indices
    finally:
        torch.set_default_device(None)
    assert torch.equal(indices.sort().values, scores.topk(5).indices.sort().values)


@needs_compiler
def test_empty_slots_are_not_read():
    memory = torch.full((4, 32), torch.nan)
    x = torch.randn(4, 32)
    norms = torch_ops.accumulate_and_score(memory, x, torch.zeros(4))
    assert torch.equal(memory, x)
    torch.testing.assert_close(norms, x.norm(dim=1))


@pytest.mark.parametrize("dtype", [dtype for dtype, _ in KINDS])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_show_in_every_norm(value, dtype):
    x = torch.randn(40, 32, dtype=dtype)
    x[[3, 39], [0, 31]] = value
    carry = torch.ones(40, dtype=torch_ops.score_dtype(dtype))
    norms = (
        torch_ops.row_norms(x),
        torch_ops.accumulate_and_score(torch.zeros_like(x), x, carry),
        torch_ops.project_rows(x, torch.eye(32, 4, dtype=dtype))[1],
        torch_ops.project_gradient(x, x.new_ones(40, 4))[1],
    )
    for result in norms:
        assert (~result.isfinite()).nonzero().flatten().tolist() == [3, 39]


def test_rows_may_overlap_or_be_negated_lazily():
    x = torch.randn(64)
    windows = x.as_strided((17, 48), (1, 1))
    torch.testing.assert_close(torch_ops.row_norms(windows), windows.clone().norm(dim=1))
    negated = torch._neg_view(torch.randn(8, 16))
    slots = torch.zeros(8, 16)
    torch_ops.accumulate_and_score(slots, negated, torch.ones(8))
    assert torch.equal(slots, negated)


@pytest.mark.parametrize("memory", ["none", "residual", "signed", "subspace"])
def test_a_step_is_the_same_without_the_compiled_passes(plain, memory):
    selection = "topk" if memory in ("residual", "signed") else "priority"
    config = flat_config(k=20, rank=4, selection=selection, memory=memory)
    x, g = torch.randn(200, 32), torch.randn(200, 48)

    def steps():
        torch.manual_seed(3)
        state = new_memory(config, 32, 48)
        return torch.stack([weight_grad(x, g, config, state) for _ in range(3)])

    compiled, torch_only = both(plain, steps)
    torch.testing.assert_close(compiled, torch_only, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_is_nobodys_dtype(dtype):
    config = MemAOPConfig(k=20, memory=Subspace(rank=4))
    x = torch.randn(200, 32)

    def step():
        generator = torch.Generator().manual_seed(0)
        return weight_grad(x, x, config, new_memory(config, 32, 32), generator=generator)

    expected = step()
    torch.set_default_dtype(dtype)
    try:
        found = step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_tensors_without_memory_of_their_own_are_left_to_pytorch():
    assert native.row_norms(TwoTensor(torch.randn(4, 16), torch.randn(4, 16))) is None
    seen = []
    torch.func.grad(lambda x: seen.append(native.row_norms(x)) or x.sum())(torch.randn(4, 16))
    assert seen == [None]


def test_sparse_or_transposed_rows_are_left_to_pytorch():
    transposed = torch.randn(32, 32).t()
    assert native.project(transposed, torch.randn(32, 16), 4.0) is None
    assert native.transposed_mm(torch.randn(32, 16), transposed) is None
    assert native.row_norms(transposed) is None
    assert native.row_norms(torch.eye(4).to_sparse()) is None


@needs_compiler
def test_the_default_setting_uses_them(monkeypatch):
    for name in ("_project_in_chunks", "_transposed_mm_in_chunks"):
        monkeypatch.setattr(
            torch_ops, name, lambda *_, name=name: pytest.fail(f"{name} was called")
        )
    config = MemAOPConfig(memory=Subspace(refresh_every=1))
    memory = new_memory(config, 64, 32)
    for _ in range(3):
        weight_grad(torch.randn(100, 64), torch.randn(100, 32), config, memory)


@pytest.mark.parametrize("memory", ["residual", "signed"])
def test_rows_that_are_not_finite_leave_no_trace_in_plain_pytorch(plain, memory):
    plain()
    config = MemAOPConfig(k=2, selection="topk", memory=memory)
    state = new_memory(config, 16, 8)
    x, g = torch.randn(20, 16), torch.randn(20, 8)
    spoilt = x.clone()
    spoilt[:5] = torch.inf
    weight_grad(spoilt, g, config, state)
    assert weight_grad(x, g, config, state).isfinite().all()
    assert state.x.isfinite().all()
