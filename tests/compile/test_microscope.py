"""The tool that reads compiled kernels: what it must see, it sees."""

import dataclasses
from collections import Counter

import pytest
import torch
import triton
import triton.language as tl

from bench.microscope import bound, dots, nvidia, plain
from bench.microscope.cases import float32_products
from bench.microscope.compiling import compile_call, compile_launch, record
from bench.microscope.reading import read
from bench.microscope.report import table
from memaop_triton.kernels import targets
from memaop_triton.kernels.gpu import launch as launching
from memaop_triton.kernels.targets import TARGETS

MATRIX = {
    "sm_80": "HMMA.16816.F32.BF16",
    "sm_90": "HGMMA.64x128x16.F32.BF16",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA.16816.F32.BF16",
    "gfx942": "v_mfma_f32_32x32x8_bf16",
    "gfx950": "v_mfma_f32_32x32x16_bf16",
}


def operands(rows=4096, columns=4096, dtype=torch.bfloat16):
    return torch.empty(rows, columns, dtype=dtype), torch.empty(rows, 4096, dtype=dtype)


def compiled(target, call=plain.pointer_gemm, shape=(), **config):
    (only,) = compile_call(lambda: call(*operands(*shape), **config), TARGETS[target])
    return only


@triton.jit
def norm_kernel(x, out, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        value = tl.load(x + row * N + start + tl.arange(0, BLOCK)).to(tl.float32)
        total += value * value
    tl.store(out + row, tl.sum(total))


def norms(x):
    out = torch.empty(x.shape[0])
    launching.launch(norm_kernel, (x.shape[0],), x=x, out=out, N=x.shape[1], BLOCK=2048)
    return out


def test_a_recorded_launch_does_not_run():
    x = torch.ones(4, 4096)
    (launch,) = record(lambda: norms(x), TARGETS["sm_90"])
    assert launch.name == "norm_kernel"
    assert launch.grid == (4,)
    assert launch.arguments["x"] is x
    assert (launch.arguments["N"], launch.arguments["BLOCK"]) == (4096, 2048)
    assert (launch.num_warps, launch.num_stages) == (4, 3)


def test_an_empty_grid_is_no_launch():
    assert record(lambda: norms(torch.empty(0, 4096)), TARGETS["sm_90"]) == []


def test_launchers_see_the_target():
    seen = []
    record(lambda: seen.append(targets.current(torch.device("cpu"))), TARGETS["gfx942"])
    assert seen == [TARGETS["gfx942"]]
    assert targets.current(torch.device("cpu")) is not seen[0]


def test_divisibility_is_what_a_launch_would_find():
    (even,) = compile_call(lambda: norms(torch.empty(4, 4096)), TARGETS["sm_90"])
    (odd,) = compile_call(lambda: norms(torch.empty(4, 4097)), TARGETS["sm_90"])
    assert "%N: i32 {tt.divisibility = 16 : i32}" in even.asm["ttir"]
    assert "%N: i32 {tt.divisibility" not in odd.asm["ttir"]


@pytest.mark.parametrize("target", MATRIX)
def test_matrix_instructions_and_wide_copies(target):
    counts = read(compiled(target))
    assert list(counts.loop.matrix) == [MATRIX[target]]
    assert counts.spills == counts.stack == 0
    assert counts.loop.iterations == 1
    expected = 2 * 128 * 64 * 2 // (4 * TARGETS[target].warp_size * 16)
    assert counts.loop.wide_copies == counts.loop.all_copies == expected


def test_blackwell_accumulates_in_tensor_memory():
    kernel = compiled("sm_100")
    assert "tcgen05.mma" in kernel.asm["ptx"]
    assert read(kernel).tensor_memory == 128


def test_descriptors_shorten_the_loop():
    by_pointers = read(compiled("sm_90")).loop
    by_descriptors = read(compiled("sm_90", plain.descriptor_gemm)).loop
    assert by_descriptors.copies == {"UTMALDG": 2}
    assert by_descriptors.matrix == by_pointers.matrix
    assert by_descriptors.instructions < by_pointers.instructions


@pytest.mark.parametrize("target", ["sm_90", "gfx950"])
def test_an_odd_width_loses_the_wide_copies(target):
    even, odd = read(compiled(target)).loop, read(compiled(target, shape=(4096, 4095))).loop
    assert odd.wide_copies == even.wide_copies / 2
    assert odd.all_copies > 2 * even.all_copies
    assert odd.instructions > 2 * even.instructions


@pytest.mark.parametrize(
    ("target", "limit"), [("sm_80", {"maxnreg": 128}), ("gfx942", {"waves_per_eu": 8})]
)
def test_too_few_registers_spill(target, limit):
    (launch,) = record(lambda: plain.pointer_gemm(*operands()), TARGETS[target])
    starved = dataclasses.replace(launch, arguments=launch.arguments | limit)
    counts = read(compile_launch(starved, TARGETS[target]))
    assert counts.registers <= 128
    assert counts.spills > 0
    assert counts.stack > 0


@pytest.mark.parametrize(("target", "copy"), [("sm_90", "LDG.128"), ("gfx942", "buffer_load.128")])
def test_a_kernel_without_products_has_a_loop_that_loads(target, copy):
    (kernel,) = compile_call(lambda: norms(torch.empty(16, 1 << 14)), TARGETS[target])
    counts = read(kernel)
    assert not counts.loop.matrix
    assert counts.loop.copies[copy] == counts.loop.all_copies > 0
    limits = bound.bound(kernel, counts)
    assert limits.tensor == 0
    assert limits.limited_by == "bytes"


def test_unrolling_shows_in_the_products():
    kernel = compiled("sm_80")
    once = read(kernel).loop.matrix
    twice = Counter({name: 2 * n for name, n in once.items()})
    assert dots.iterations(kernel.asm["ttgir"], nvidia._depth, twice) == 2


@pytest.mark.parametrize("target", TARGETS)
def test_published_peaks_are_powers_of_two_per_cycle(target):
    chip = bound.CHIPS[target]
    for kind in ("half", "tf32", "single"):
        clock = chip.single_clock if kind == "single" and chip.single_clock else chip.clock
        peak = chip.rate(kind) * chip.processors * clock / 1e3
        assert peak == pytest.approx(getattr(chip, kind), rel=0.02)


def test_bound_of_a_known_tile():
    kernel = compiled("sm_90")
    counts = read(kernel)
    limits = bound.bound(kernel, counts)
    assert limits.tensor == 2 * 128 * 128 * 64 / 4096
    assert limits.issue == counts.loop.instructions * 4 / 4
    assert limits.bytes == 2 * 128 * 64 * 2 / 64
    tma = compiled("sm_90", plain.descriptor_gemm)
    assert bound.bound(tma, read(tma)).bytes == limits.bytes


def tensor_cycles(kernel):
    return bound.bound(kernel, read(kernel)).tensor


@pytest.mark.parametrize(("precision", "factor"), [("tf32", 2), ("ieee", 16)])
def test_float32_products_take_the_rate_of_their_instructions(precision, factor):
    half = compiled("sm_80")
    with float32_products(precision):
        single = compiled("sm_80", shape=(4096, 4096, torch.float32))
    assert bool(read(single).matrix) == (precision == "tf32")
    assert tensor_cycles(single) == factor * tensor_cycles(half)


def test_table():
    text = table(("kernel", "loop"), [("gather", "100")])
    assert text == "| kernel | loop |\n|---|---:|\n| gather | 100 |"
