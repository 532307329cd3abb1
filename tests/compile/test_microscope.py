"""The tool that reads compiled kernels: what it must see, it sees."""

import dataclasses

import pytest
import torch

from bench.microscope.compiling import compile_call, compile_launch, record
from bench.microscope.reading import read
from bench.microscope.report import table
from memaop_triton.bench.suites.plain_gemm import plain_gemm
from memaop_triton.kernels import targets
from memaop_triton.kernels.gpu.score import row_norms
from memaop_triton.kernels.targets import TARGETS
from memaop_triton.kernels.tuning.config import GemmConfig, RowConfig

MATRIX = {
    "sm_80": "HMMA.16816.F32.BF16",
    "sm_90": "HGMMA.64x128x16.F32.BF16",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA.16816.F32.BF16",
    "gfx942": "v_mfma_f32_32x32x8_bf16",
    "gfx950": "v_mfma_f32_32x32x16_bf16",
}


def product(columns=4096, by_descriptor=False):
    g, x = (torch.empty(4096, count, dtype=torch.bfloat16) for count in (columns, 4096))
    return plain_gemm(g, x, config=GemmConfig(128, 128, 64, 4, 3), by_descriptor=by_descriptor)


def compiled(target, **options):
    (only,) = compile_call(lambda: product(**options), TARGETS[target])
    return only


def norms(*shape):
    return row_norms(torch.empty(shape), config=RowConfig(8, 256, 4, 2))


def test_a_recorded_launch_does_not_run():
    (launch,) = record(lambda: norms(20, 4096), TARGETS["sm_90"])
    assert launch.name == "score_kernel"
    assert launch.grid == (3,)
    assert launch.arguments["x_ptr"].shape == (20, 4096)
    assert (launch.arguments["N"], launch.arguments["BLOCK_C"]) == (4096, 256)
    assert (launch.num_warps, launch.num_stages) == (4, 2)


def test_an_empty_grid_is_no_launch():
    assert record(lambda: norms(0, 4096), TARGETS["sm_90"]) == []


def test_launchers_see_the_target():
    seen = []
    record(lambda: seen.append(targets.current(torch.device("cpu"))), TARGETS["gfx942"])
    assert seen == [TARGETS["gfx942"]]
    assert targets.current(torch.device("cpu")) is not seen[0]


def test_divisibility_is_what_a_launch_would_find():
    (even,) = compile_call(lambda: norms(20, 4096), TARGETS["sm_90"])
    (odd,) = compile_call(lambda: norms(20, 4097), TARGETS["sm_90"])
    assert "%N: i32 {tt.divisibility = 16 : i32}" in even.asm["ttir"]
    assert "%N: i32 {tt.divisibility" not in odd.asm["ttir"]


@pytest.mark.parametrize("target", MATRIX)
def test_matrix_instructions_and_wide_copies(target):
    counts = read(compiled(target))
    assert list(counts.loop.matrix) == [MATRIX[target]]
    assert counts.spills == counts.stack == 0
    expected = 2 * 128 * 64 * 2 // (4 * TARGETS[target].warp_size * 16)
    assert counts.loop.wide_copies == counts.loop.copies.total() == expected


def test_descriptors_shorten_the_loop():
    by_pointers = read(compiled("sm_90")).loop
    by_descriptors = read(compiled("sm_90", by_descriptor=True)).loop
    assert by_descriptors.copies == {"UTMALDG": 2}
    assert by_descriptors.matrix == by_pointers.matrix
    assert by_descriptors.instructions < by_pointers.instructions


@pytest.mark.parametrize("target", ["sm_90", "gfx950"])
def test_an_odd_width_loses_the_wide_copies(target):
    even, odd = read(compiled(target)).loop, read(compiled(target, columns=4095)).loop
    assert odd.wide_copies == even.wide_copies / 2
    assert odd.copies.total() > 2 * even.copies.total()
    assert odd.instructions > 2 * even.instructions


@pytest.mark.parametrize(
    ("target", "limit"), [("sm_80", {"maxnreg": 128}), ("gfx942", {"waves_per_eu": 8})]
)
def test_too_few_registers_spill(target, limit):
    (launch,) = record(product, TARGETS[target])
    starved = dataclasses.replace(launch, arguments=launch.arguments | limit)
    counts = read(compile_launch(starved, TARGETS[target]))
    assert counts.registers <= 128
    assert counts.spills > 0
    assert counts.stack > 0


@pytest.mark.parametrize(("target", "copy"), [("sm_90", "LDG.128"), ("gfx942", "buffer_load.128")])
def test_a_kernel_without_products_has_a_loop_that_loads(target, copy):
    (kernel,) = compile_call(lambda: norms(16, 1 << 14), TARGETS[target])
    loop = read(kernel).loop
    assert not loop.matrix
    assert loop.copies[copy] == loop.copies.total() > 0


def test_table():
    text = table(("kernel", "loop"), [("gather", "100")])
    assert text == "| kernel | loop |\n|---|---:|\n| gather | 100 |"
