"""The tool that reads compiled kernels: it finds all that it must report."""

import dataclasses

import pytest
import torch

from bench.microscope.compiling import compile_call, compile_launch, record
from bench.microscope.reading import read
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


def product(columns=4096):
    g, x = (torch.empty(4096, count, dtype=torch.bfloat16) for count in (columns, 4096))
    return plain_gemm(g, x, config=GemmConfig(128, 128, 64, 4, 3))


def compiled(target, columns=4096):
    (only,) = compile_call(lambda: product(columns), TARGETS[target])
    return only


def norms(*shape):
    return row_norms(torch.empty(shape), config=RowConfig(8, 256, 4, 2))


def test_recorded_launches_are_those_of_the_target_and_do_not_run():
    seen = []

    def call():
        seen.append(targets.current(torch.device("cpu")))
        norms(0, 4096)  # an empty grid is no launch
        norms(20, 4096)

    (launch,) = record(call, TARGETS["gfx942"])
    assert seen == [TARGETS["gfx942"]] != [targets.current(torch.device("cpu"))]
    assert launch.name == "score_kernel"
    assert launch.grid == (3,)
    assert launch.arguments["x_ptr"].shape == (20, 4096)
    assert (launch.arguments["N"], launch.arguments["BLOCK_C"]) == (4096, 256)
    assert (launch.num_warps, launch.num_stages) == (4, 2)


@pytest.mark.parametrize("target", MATRIX)
def test_matrix_instructions_and_wide_copies(target):
    counts = read(compiled(target))
    assert list(counts.loop.matrix) == [MATRIX[target]]
    assert counts.spills == counts.stack == 0
    expected = 2 * 128 * 64 * 2 // (4 * TARGETS[target].warp_size * 16)
    assert counts.loop.wide_copies == counts.loop.copies.total() == expected


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
