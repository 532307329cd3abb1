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


def test_distinct_bytes_under_a_mask():
    x, rows, out = torch.randn(10, 13), torch.tensor([7, 2, 2, 9]), torch.empty(4, 13)
    with interpreted(), counted() as launches:
        launch(gather, (4,), x=x, rows=rows, out=out, n=13, BLOCK=BLOCK)
    assert torch.equal(out, x[rows])
    assert launches == [("gather", {"x": 3 * 13 * 4, "rows": 4 * 8}, {"out": 4 * 13 * 4})]


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
