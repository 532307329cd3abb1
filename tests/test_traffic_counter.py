import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.errors import InterpreterError

from memaop_triton.kernels.gpu.launch import OPTIONS, launch
from tests.traffic import OutOfBoundsError, counted, interpreted

BLOCK = 16


@triton.jit
def gather(x, rows, out, n, BLOCK: tl.constexpr):
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    at = tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0) * n + at, tl.load(x + row * n + at, mask=at < n), mask=at < n)


@triton.jit
def column_sums(x, out, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + tl.arange(0, BLOCK), tl.load(x + at).sum(0) + tl.zeros((BLOCK,), tl.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 13, 16])
def test_distinct_bytes_under_a_mask(n, dtype):
    x, rows = torch.randn(10, n).to(dtype), torch.tensor([7, 2, 2, 9])
    out = torch.empty(4, n, dtype=dtype)
    with interpreted(), counted() as launches:
        launch(gather, (4,), x=x, rows=rows, out=out, n=n, BLOCK=BLOCK)
        launch(gather, (1,), x=out, rows=rows[1:] - 2, out=out, n=n, BLOCK=BLOCK)
    assert torch.equal(out, x[rows])
    row = n * dtype.itemsize
    assert [(seen.kernel, seen.read, seen.written) for seen in launches] == [
        ("gather", {"x": 3 * row, "rows": 4 * 8}, {"out": 4 * row}),
        ("gather", {"x": row, "rows": 8}, {"x": row}),  # by the first name that the memory has
    ]


def test_out_of_bounds():
    x, rows, out = torch.randn(9, BLOCK), torch.tensor([8, 9]), torch.empty(2, BLOCK)
    with (
        interpreted(),
        counted(),
        pytest.raises(InterpreterError, match=OutOfBoundsError.__name__),
    ):
        launch(gather, (2,), x=x, rows=rows, out=out, n=BLOCK, BLOCK=BLOCK)


def test_the_compiler_is_as_before_afterwards(monkeypatch):
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    sizes = {"ROWS": 4, "BLOCK": BLOCK}
    types = {"x": "*fp32", "out": "*fp32"} | dict.fromkeys(sizes, "constexpr")

    def compiled():
        source = ASTSource(column_sums, types, constexprs=sizes)
        target = GPUTarget("cuda", 90, 32)
        return triton.compile(source, target=target, options=OPTIONS).asm["ttir"]

    before = compiled()
    x, out = torch.randn(4, BLOCK), torch.empty(BLOCK)
    with interpreted():
        launch(column_sums, (1,), x=x, out=out, **sizes)
    torch.testing.assert_close(out, x.sum(0))
    assert compiled() == before
    with pytest.raises(RuntimeError, match="outside of the scope"):
        column_sums(x, out, 4, BLOCK)
