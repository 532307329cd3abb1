import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from memaop_triton.kernels.gpu.launch import OPTIONS, launch
from tests.traffic import OutOfBoundsError, counted, interpreted

BLOCK = 16


@pytest.fixture
def traffic():
    with interpreted(), counted() as launches:
        yield launches


@triton.jit
def copy(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def gather(x, rows, out, stride, BLOCK: tl.constexpr):
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    at = tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0) * BLOCK + at, tl.load(x + row * stride + at))


@triton.jit
def row_sums(x, out, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    total = tl.sum(tl.load(x + row * BLOCK + tl.arange(0, BLOCK)), 0)
    tl.store(out + row, total)
    tl.atomic_add(out + tl.num_programs(0), total)


@triton.jit
def double(x, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, 2 * tl.load(x + at))


@triton.jit
def copy_tile(tiles, out, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0) * ROWS
    at = (first + tl.arange(0, ROWS))[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + at, tiles.load([first, 0]))


@triton.jit
def column_sums(x, out, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + tl.arange(0, BLOCK), tl.load(x + at).sum(0) + tl.zeros((BLOCK,), tl.float32))


@triton.jit
def product(g, x, out, K, BLOCK: tl.constexpr):
    at, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    n = tl.program_id(0) * BLOCK + at
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK):
        some_g = tl.load(g + at[:, None] + (start + k)[None, :] * BLOCK)
        some_x = tl.load(x + (start + k)[:, None] * BLOCK * tl.num_programs(0) + n[None, :])
        total = tl.dot(some_g, some_x, total)
    tl.store(out + at[:, None] * BLOCK * tl.num_programs(0) + n[None, :], total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("n", [1, 16, 37])
def test_copy_under_a_mask(traffic, n, dtype):
    x, out = torch.arange(48).to(dtype), torch.zeros(48, dtype=dtype)
    launch(copy, (triton.cdiv(n, BLOCK),), x=x, out=out, n=n, BLOCK=BLOCK)
    assert torch.equal(out[:n], x[:n])
    (seen,) = traffic
    size = n * dtype.itemsize
    assert (seen.kernel, seen.read, seen.written) == ("copy", {"x": size}, {"out": size})
    assert seen.moved == 2 * size


def test_gather_counts_a_row_once(traffic):
    x, rows = torch.randn(10, BLOCK), torch.tensor([7, 2, 2, 9])
    out = torch.empty(4, BLOCK)
    launch(gather, (4,), x=x, rows=rows, out=out, stride=x.stride(0), BLOCK=BLOCK)
    assert torch.equal(out, x[rows])
    (seen,) = traffic
    assert seen.read == {"x": 3 * BLOCK * 4, "rows": 4 * 8}
    assert seen.written == {"out": 4 * BLOCK * 4}


def test_product_counts_what_programs_share_once(traffic):
    g, x, out = torch.randn(64, BLOCK), torch.randn(64, 3 * BLOCK), torch.empty(BLOCK, 3 * BLOCK)
    launch(product, (3,), g=g, x=x, out=out, K=64, BLOCK=BLOCK)
    torch.testing.assert_close(out, g.T @ x)
    assert traffic[0].moved == 4 * (g.numel() + x.numel() + out.numel())


def test_atomics_count_as_read_and_written(traffic):
    x, out = torch.randn(4, BLOCK), torch.zeros(5)
    launch(row_sums, (4,), x=x, out=out, BLOCK=BLOCK)
    torch.testing.assert_close(out[:4], x.sum(1))
    torch.testing.assert_close(out[4], x.sum())
    assert (traffic[0].read["out"], traffic[0].written["out"]) == (4, 20)


def test_in_place(traffic):
    x = torch.ones(40)
    launch(double, (1,), x=x[8:], BLOCK=BLOCK)
    assert (traffic[0].read, traffic[0].written) == ({"x": 64}, {"x": 64})
    assert x[8:24].eq(2).all()
    assert x[24:].eq(1).all()


def test_memory_passed_twice_counts_once(traffic):
    x = torch.randn(32)
    first = x[8:16].clone()
    launch(copy, (1,), x=x[8:], out=x[8:], n=16, BLOCK=BLOCK)
    launch(copy, (1,), x=x[8:], out=x[16:], n=8, BLOCK=BLOCK)
    assert torch.equal(x[16:24], first)
    assert [(seen.read, seen.written) for seen in traffic] == [
        ({"x": 64}, {"x": 64}),
        ({"x": 32}, {"x": 32}),
    ]


def test_tensor_copies_stop_at_the_tensor(traffic):
    x, out = torch.randn(24, BLOCK), torch.empty(32, BLOCK)
    tiles = TensorDescriptor.from_tensor(x, [16, BLOCK])
    launch(copy_tile, (2,), tiles=tiles, out=out, ROWS=16, BLOCK=BLOCK)
    assert torch.equal(out[:24], x)
    assert (traffic[0].read, traffic[0].written) == ({"tiles": 24 * 64}, {"out": 32 * 64})


def test_every_launch_is_recorded_by_itself(traffic):
    x, out = torch.randn(32), torch.empty(32)
    for n in (16, 32):
        launch(copy, (n // BLOCK,), x=x, out=out, n=n, BLOCK=BLOCK)
    launch(copy, (0,), x=x, out=out, n=0, BLOCK=BLOCK)
    assert [(seen.grid, seen.moved) for seen in traffic] == [((1,), 128), ((2,), 256)]


@pytest.mark.usefixtures("traffic")
def test_out_of_bounds():
    with pytest.raises(InterpreterError, match=OutOfBoundsError.__name__):
        launch(copy, (2,), x=torch.randn(28), out=torch.empty(32), n=32, BLOCK=BLOCK)


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
