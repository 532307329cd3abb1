"""The test of the test: a fault of each kind, planted in a small kernel, is caught."""

import contextlib

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from memaop_triton.kernels.gpu.launch import launch

BLOCK = 16


@triton.jit
def copy(x, out, n, BLOCK: tl.constexpr, READ_ALL: tl.constexpr, WRITE_ALL: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < n
    value = tl.load(x + at, mask=here | READ_ALL, other=0.0)
    tl.store(out + at, value, mask=here | WRITE_ALL)


@triton.jit
def accumulate(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(out + at) + tl.load(x + tl.program_id(0) * BLOCK + at))


@triton.jit
def accumulate_atomically(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.atomic_add(out + at, tl.load(x + tl.program_id(0) * BLOCK + at))


@triton.jit
def number_programs(out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.program_id(0))


@triton.jit
def shift(x, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at + 1))


@triton.jit
def gather_row(x, rows, out, stride, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    row = tl.load(rows + tl.program_id(0))
    if WIDE:
        row = row.to(tl.int64)
    at = tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0) * BLOCK + at, tl.load(x + row * stride + at))


@triton.jit
def product(g, x, out, K, BLOCK: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr):
    """dW [BLOCK, BLOCK] = gᵀ [BLOCK, K] x [K, BLOCK]"""
    at, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK):
        some_g = tl.load(g + at[:, None] + (start + k)[None, :] * BLOCK)
        some_x = tl.load(x + (start + k)[:, None] * BLOCK + at[None, :])
        total = tl.dot(some_g, some_x, total, input_precision=PRECISION)
        if NARROW:
            total = total.to(tl.bfloat16).to(tl.float32)
    tl.store(out + at[:, None] * BLOCK + at[None, :], total)


@triton.jit
def copy_tile(tiles, out, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0) * ROWS
    at = (first + tl.arange(0, ROWS))[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + at, tiles.load([first, 0]))


def run_copy(x, out, n, **kwargs):
    options = {"READ_ALL": False, "WRITE_ALL": False} | kwargs
    launch(copy, (triton.cdiv(n, BLOCK),), x=x, out=out, n=n, BLOCK=BLOCK, **options)


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="cuda")


def test_a_right_kernel_passes(normal):
    x, out = normal(20), empty(20)
    run_copy(x, out, 20)
    assert torch.equal(out, x)


def test_read_out_of_bounds(gpu, normal):
    with gpu.caught("oob_read", "tl.load(x + at, "):
        run_copy(normal(20), empty(20), 20, READ_ALL=True)


def test_write_out_of_bounds(gpu, normal):
    with gpu.caught("oob_write", "tl.store(out + at, value, "):
        run_copy(normal(20), empty(20), 20, WRITE_ALL=True)


def test_read_beside_a_part_of_a_tensor(normal):
    x, out = normal(4, 20, padded=True), empty(32)
    run_copy(x[0], out, 32, READ_ALL=True)
    assert out[20:].isnan().any()


def test_offset_beyond_32_bits(gpu, normal, far):
    stride, first = 1 << 20, 1 << 12
    x = torch.empty_strided((2, BLOCK), (stride, 1), device="cuda").copy_(normal(2, BLOCK))
    rows = torch.tensor([first, first + 1], dtype=torch.int32, device="cuda")
    out = empty(2, BLOCK)
    arguments = {"x": far(x, first), "rows": rows, "out": out, "stride": stride, "BLOCK": BLOCK}
    launch(gather_row, (2,), **arguments, WIDE=True)
    assert torch.equal(out, x)
    with gpu.caught("oob_read", "tl.load(x + row * stride + at)"):
        launch(gather_row, (2,), **arguments, WIDE=False)


def test_read_of_uninitialised_memory(normal, as_good_as):
    x = normal(1, BLOCK)
    out = empty(BLOCK)
    launch(accumulate, (1,), x=x, out=out, BLOCK=BLOCK)
    with pytest.raises(AssertionError, match="never written"):
        as_good_as(out, x[0], x[0].double())


def test_unwritten_output(normal, as_good_as):
    x, out = normal(20), empty(20)
    run_copy(x, out, 16)
    with pytest.raises(AssertionError, match="never written"):
        as_good_as(out, x, x.double())


def test_uninitialised_index(gpu, normal):
    x, rows, out = normal(4, BLOCK), empty(1, dtype=torch.int32), empty(BLOCK)
    with gpu.caught("oob_read", "tl.load(x + row * stride + at)"):
        launch(
            gather_row, (1,), x=x, rows=rows, out=out, stride=x.stride(0), BLOCK=BLOCK, WIDE=True
        )


def test_two_programs_write_one_place(gpu):
    with gpu.caught("race", "tl.store(out + tl.arange(0, BLOCK), tl.program_id(0))"):
        launch(number_programs, (2,), out=empty(BLOCK, dtype=torch.int32), BLOCK=BLOCK)


def test_two_programs_accumulate_without_atomics(gpu, normal):
    x = normal(4, BLOCK)
    with gpu.caught("race", "tl.store(out + at"):
        launch(accumulate, (4,), x=x, out=torch.zeros(BLOCK, device="cuda"), BLOCK=BLOCK)


def test_two_programs_accumulate_with_atomics(normal):
    x, out = normal(4, BLOCK), torch.zeros(BLOCK, device="cuda")
    launch(accumulate_atomically, (4,), x=x, out=out, BLOCK=BLOCK)
    torch.testing.assert_close(out, x.sum(0))


def test_one_program_reads_what_another_writes(gpu, normal):
    with gpu.caught("race", "tl.store(x + at"):
        launch(shift, (2,), x=normal(2 * BLOCK + 1), BLOCK=BLOCK)


@pytest.mark.parametrize(
    ("dtype", "precision", "narrow", "right"),
    [
        (torch.bfloat16, "tf32", False, True),
        (torch.bfloat16, "tf32", True, False),
        (torch.float16, "tf32", False, True),
        (torch.float32, "ieee", False, True),
        (torch.float32, "tf32", False, False),
    ],
)
def test_precision_of_a_sum(normal, as_good_as, dtype, precision, narrow, right):
    g, x = normal(256, BLOCK, dtype=dtype), normal(256, BLOCK, dtype=dtype)
    out = empty(BLOCK, BLOCK)
    options = {"BLOCK": BLOCK, "NARROW": narrow, "PRECISION": precision}
    launch(product, (1,), g=g, x=x, out=out, K=256, **options)
    verdict = contextlib.nullcontext() if right else pytest.raises(AssertionError, match="error")
    with verdict:
        as_good_as(out, g.float().T @ x.float(), g.double().T @ x.double())


def test_tensor_copies_end_with_the_tensor(normal):
    x, out = normal(24, BLOCK, dtype=torch.bfloat16), empty(32, BLOCK, dtype=torch.bfloat16)
    tiles = TensorDescriptor.from_tensor(x, [16, BLOCK])
    launch(copy_tile, (2,), tiles=tiles, out=out, ROWS=16, BLOCK=BLOCK)
    assert torch.equal(out[:24], x)
    assert (out[24:] == 0).all()
