"""Passes over rows agree with float64, in C and in plain PyTorch."""

import functools
import weakref
from unittest.mock import Mock

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from memaop_triton import MemAOPConfig, Subspace, new_memory
from memaop_triton.backward.weight_grad import weight_grad
from memaop_triton.kernels import env
from memaop_triton.kernels.cpu import library, native, torch_ops
from tests.compiled import KINDS, needs_compiler
from tests.pairwise import pairwise
from tests.test_dispatch import OnGpu

SHAPES = [(1, 1), (3, 17), (129, 3), (17, 129), (0, 5), (600, 64)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
STRIDES = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.T.contiguous().T,
    "padded-rows": lambda t: torch.nn.functional.pad(t, (2, 3), value=torch.nan)[:, 2:-3],
    "every-other-column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
}


def close(result, exact, dtype):
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), exact, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize(("shape", "dtype", "stride"), pairwise(SHAPES, DTYPES, STRIDES))
def test_row_norms(shape, dtype, stride, way):
    a = STRIDES[stride](torch.randn(shape).to(dtype))
    norms = torch_ops.row_norms(a)
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(norms, a.double().square().sum(1).sqrt(), norms.dtype)


@pytest.mark.parametrize(
    ("shape", "dtype", "stored", "stride"), pairwise(SHAPES, DTYPES, [None, *DTYPES], STRIDES)
)
def test_accumulate_and_score(shape, dtype, stored, stride, way):
    stored = stored or dtype
    rows = STRIDES[stride](torch.randn(shape).to(dtype))
    memory = torch.randn(shape).to(stored)
    carry = torch.randn(shape[0]).to(torch_ops.score_dtype(stored))
    carry[::3] = 0
    exact = carry.double()[:, None] * memory.double() + rows.double()
    norms = torch_ops.accumulate_and_score(memory, rows, carry)
    close(memory, exact, max(stored, carry.dtype, key=lambda d: torch.finfo(d).eps))
    assert norms.dtype == carry.dtype
    close(norms, memory.double().square().sum(1).sqrt(), carry.dtype)


@pytest.mark.parametrize(
    ("shape", "rank", "count", "kind"),
    pairwise(
        [(1, 16), (9, 80), (137, 96), (300, 272), (64, 17)],
        [1, 4, 16, 20, 32, 40, 64, 65],
        [1, 2, 3],
        KINDS,
    ),
)
def test_projections(shape, rank, count, kind, threads, plain):
    (rows, columns), (dtype, off) = shape, kind
    x = torch.randn(rows, columns).to(dtype)
    basis = torch.linalg.qr(torch.randn(max(rank, columns), rank)).Q[:columns].to(dtype)
    threads(count)
    z, norms = torch_ops.project_rows(x, basis)
    product, x_norms, sums = torch_ops.project_gradient(x, z, bias_grad=True)
    again = torch_ops.transposed_mm(z, x)
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
    near(torch_ops.project_gradient(x, z)[0], product, rtol=fine, atol=10 * fine)


def test_room_lives_until_the_call_returns(monkeypatch):
    """Where it is too large to be kept, nobody else holds it."""
    references, alive = [], []

    def transposed_product(*arguments):
        alive.append(references[-1]() is not None)

    def room_for(number, count):
        room = torch.empty(count, dtype=torch.uint8)
        references.append(weakref.ref(room))
        return room

    monkeypatch.setattr(native, "room_for", room_for)
    code = Mock(product_room_f32=lambda *_: 64, transposed_product_f32=transposed_product)
    monkeypatch.setattr(library, "_library", lambda: code)
    native.transposed_mm(torch.randn(8, 4), torch.randn(8, 16))
    assert alive == [True]


@pytest.mark.parametrize("dtype", library.DTYPES)
@pytest.mark.parametrize("rank", [4, 16, 40])
def test_what_a_basis_leaves_of_its_own_rows_is_rounding_and_never_nothing(rank, dtype, way):
    basis = torch.linalg.qr(torch.randn(96, rank, dtype=torch_ops.score_dtype(dtype))).Q.to(dtype)
    rows = torch.randn(50, rank, dtype=dtype) @ basis.t()
    rest = torch_ops.project_rows(rows, basis)[1] / torch_ops.row_norms(rows)
    least = torch.finfo(dtype).eps ** 0.5
    assert rest.min() >= 0.99 * least
    assert rest.max() <= (2 if dtype == torch.bfloat16 else 10) * least


@pytest.mark.parametrize("allowed", [True, False])
def test_on_a_gpu_it_is_the_rounding_of_tf32_where_that_multiplies(allowed, monkeypatch):
    monkeypatch.setattr(env, "allows_tf32", lambda: allowed)
    for dtype in (torch.float32, torch.float64, torch.half):
        eps, rows = torch.finfo(dtype).eps, torch.ones(2, 2, dtype=dtype)
        assert torch_ops._rounding_of_products(rows) == eps
        expected = 2.0**-10 if allowed and dtype == torch.float32 else eps
        assert torch_ops._rounding_of_products(rows.as_subclass(OnGpu)) == expected


@pytest.mark.parametrize(("dtype", "off"), KINDS)
def test_rows_may_overlap(dtype, off):
    z, a = (torch.randn(9 + n - 1).to(dtype).unfold(0, n, 1) for n in (4, 32))
    torch.testing.assert_close(torch_ops.row_norms(a), torch_ops.row_norms(a.clone()))
    product = torch_ops.transposed_mm(z, a)
    torch.testing.assert_close(product.double(), z.double().t() @ a.double(), rtol=off, atol=1e-4)


def test_rows_may_be_negated_lazily():
    negated = torch._neg_view(torch.randn(8, 16))
    slots = torch.zeros(8, 16)
    torch_ops.accumulate_and_score(slots, negated, torch.ones(8))
    assert torch.equal(slots, negated)


@needs_compiler
def test_empty_slots_are_not_read():
    memory = torch.full((4, 32), torch.nan)
    x = torch.randn(4, 32)
    norms = torch_ops.accumulate_and_score(memory, x, torch.zeros(4))
    assert torch.equal(memory, x)
    torch.testing.assert_close(norms, x.norm(dim=1))


@pytest.mark.parametrize("dtype", library.DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_show_in_every_norm(value, dtype, way):
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


def test_what_the_c_code_cannot_address_is_left_to_pytorch():
    transposed = torch.randn(32, 32).t()
    assert native.project(transposed, torch.randn(32, 16), 4.0) is None
    assert native.transposed_mm(torch.randn(32, 16), transposed) is None
    for rows in (transposed, torch.eye(4).to_sparse(), TwoTensor(torch.eye(4), torch.eye(4))):
        assert native.row_norms(rows) is None
    seen = []
    torch.func.grad(lambda x: seen.append(native.row_norms(x)) or x.sum())(torch.randn(4, 16))
    assert seen == [None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_is_nobodys_dtype(dtype, way):
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


@needs_compiler
def test_the_default_setting_uses_the_c_code(monkeypatch):
    monkeypatch.setattr(torch_ops, "_chunk_rows", lambda a: pytest.fail("computes by PyTorch"))
    config = MemAOPConfig(memory=Subspace(refresh_every=1))
    memory = new_memory(config, 64, 32)
    for _ in range(3):
        weight_grad(torch.randn(100, 64), torch.randn(100, 32), config, memory)
