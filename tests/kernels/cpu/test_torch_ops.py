import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memaop_triton.kernels import env
from memaop_triton.kernels.cpu import torch_ops
from tests.pairwise import pairwise

SHAPES = [(1, 1), (3, 17), (129, 3), (17, 129), (0, 5)]
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
def test_row_norms(shape, dtype, stride):
    a = STRIDES[stride](torch.randn(shape).to(dtype))
    norms = torch_ops.row_norms(a)
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(norms, a.double().square().sum(1).sqrt(), norms.dtype)


@pytest.mark.parametrize(
    ("shape", "dtype", "stored", "stride"), pairwise(SHAPES, DTYPES, DTYPES, STRIDES)
)
def test_accumulate_and_score(shape, dtype, stored, stride):
    rows = STRIDES[stride](torch.randn(shape).to(dtype))
    memory = torch.randn(shape).to(stored)
    carry = torch.randn(shape[0]).to(torch_ops.score_dtype(stored))
    carry[::3] = 0
    exact = carry.double()[:, None] * memory.double() + rows.double()
    norms = torch_ops.accumulate_and_score(memory, rows, carry)
    close(memory, exact, max(stored, carry.dtype, key=lambda d: torch.finfo(d).eps))
    assert norms.dtype == carry.dtype
    close(norms, memory.double().square().sum(1).sqrt(), carry.dtype)


@pytest.mark.parametrize("rows", [1, 17, 600])
@pytest.mark.parametrize("weighted", [True, False])
def test_gather_gemm(rows, weighted):
    x, g = torch.randn(700, 5, dtype=torch.float64), torch.randn(700, 3, dtype=torch.float64)
    indices = torch.randint(700, (rows,)).sort().values
    weights = torch.rand(rows, dtype=torch.float64) if weighted else None
    scale = torch.ones(rows, dtype=torch.float64) if weights is None else weights
    expected = sum(torch.outer(g[i], x[i]) * w for i, w in zip(indices, scale, strict=True))
    torch.testing.assert_close(torch_ops.gather_gemm(x, g, indices, weights), expected)
    turned = torch_ops.gather_gemm(x, g, indices, weights, transposed=True)
    torch.testing.assert_close(turned, expected.T)
    assert turned.is_contiguous()


def test_gather_gemm_of_no_rows_is_zero():
    x, g = torch.randn(7, 5), torch.randn(7, 3)
    poison = torch.full((3, 5), torch.nan)
    del poison
    nothing = torch.empty(0, dtype=torch.int64)
    assert torch.equal(torch_ops.gather_gemm(x, g, nothing), torch.zeros(3, 5))


def test_sampled_rows_of_float16_keep_its_range():
    g, w = torch.full((4, 8), 5e3).half(), torch.full((8, 3), 1e-2).half()
    dx = torch_ops.sampled_rows_mm(g, w, torch.tensor([0, 2]), torch.tensor([100.0, 30.0]))
    exact = torch.tensor([4e4, 0, 1.2e4, 0]).unsqueeze(1).expand(4, 3)
    torch.testing.assert_close(dx.float(), exact, rtol=2e-3, atol=0)


class _Operations(TorchDispatchMode):
    """Notes the operations that are called."""

    def __init__(self):
        super().__init__()
        self.called = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.add(func.overloadpacket)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sampled_rows_mm_adds_by_atomics_nowhere(device):
    """Elsewhere than on a CPU `index_add_` may add a row's parts in any order."""
    operands = torch.ones(6, 4, device=device), torch.ones(4, 3, device=device)
    with _Operations() as operations:
        torch_ops.sampled_rows_mm(*operands, torch.tensor([2, 2, 4], device=device))
    assert (torch.ops.aten.index_add_ in operations.called) == (device == "cpu")
    assert (torch.ops.aten.index_put_ in operations.called) == (device != "cpu")


def test_rows_added_in_order_are_those_added_in_any():
    total, rows = torch.randn(20, 3).double(), torch.randn(50, 3).double()
    indices = torch.randint(0, 20, (50,)).sort().values
    expected = total.index_add(0, indices, rows)
    torch.testing.assert_close(torch_ops._add_in_order(total, indices, rows), expected)


def test_sampled_rows_mm_adds_rows_named_twice():
    g, w = torch.randn(7, 3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    weights = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)
    expected = torch.zeros(7, 5, dtype=torch.float64)
    expected[2], expected[4] = 2.5 * (g[2] @ w), g[4] @ w
    result = torch_ops.sampled_rows_mm(g, w, torch.tensor([2, 2, 4]), weights)
    torch.testing.assert_close(result, expected)


class _OnGpu:
    """What is asked of rows before they are multiplied."""

    is_cuda = True

    def __init__(self, dtype):
        self.dtype = dtype


@pytest.mark.parametrize("allowed", [True, False])
def test_the_rest_drowns_in_the_rounding_of_tf32_where_that_multiplies(allowed, monkeypatch):
    monkeypatch.setattr(env, "allows_tf32", lambda: allowed)
    rounding = torch_ops._rounding_of_products
    eps = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64, torch.half)}
    assert rounding(_OnGpu(torch.float32)) == (2.0**-10 if allowed else eps[torch.float32])
    for dtype in (torch.float64, torch.half):
        assert rounding(_OnGpu(dtype)) == eps[dtype]
    assert rounding(torch.ones(2, 2)) == eps[torch.float32]
