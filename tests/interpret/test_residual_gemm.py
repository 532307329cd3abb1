"""The fused residual GEMM: against its formula in float64, and against update and GEMM apart."""

from dataclasses import replace

import pytest
import torch

from memaop_triton.kernels.gpu.residual_gemm import residual_gemm
from tests.judging import LAYOUTS, SMALL, drawn_blocks, operands
from tests.kernel_checks import CARRY, SEED, check_fused_step, check_residual, new_memory, scalar
from tests.pairwise import pairwise

CONFIGS = {"whole": SMALL, "split": replace(SMALL, split_k=3), "chosen": None}
# M, N, P, K
SHAPES = [
    (1, 1, 1, 1),
    (17, 3, 1, 17),
    (50, 33, 17, 20),
    (100, 16, 48, 64),
    (129, 17, 32, 129),
    (10, 33, 17, 0),
]


def some_rows(rows, count):
    return torch.randperm(rows)[:count].sort().values


@pytest.mark.parametrize(
    ("shape", "config", "dtype"), pairwise(SHAPES, CONFIGS, [torch.float16, torch.float32])
)
def test_shapes(shape, config, dtype):
    (*sizes, k), signed = shape, config != "whole"
    indices = some_rows(shape[0], k).to(torch.int32 if signed else torch.int64)
    stored = torch.float32 if signed else dtype
    check_residual(sizes, indices, dtype, stored, signed=signed, config=CONFIGS[config])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", [(33, 17), (32, 48)], ids=["odd", "even"])
def test_strides(layout, columns):
    dtype, rows = torch.float32, some_rows(40, 27)
    check_residual((40, *columns), rows, dtype, dtype, layout, signed=False, config=SMALL)


@pytest.mark.parametrize(
    ("rows", "block_rows", "blocks", "split"),
    [
        (70, 16, [1, 4], 1),
        (70, 32, [0, 2], 2),
        (5, 16, [0], 1),
        (140, 128, [1], 1),
        (64, 64, [0], 2),
    ],
)
def test_blocks(rows, block_rows, blocks, split):
    check_residual(
        (rows, 33, 17), drawn_blocks(blocks, block_rows), torch.float32, torch.float32,
        signed=True, block_rows=block_rows, config=replace(SMALL, split_k=split),
    )  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_lost_row_is_everywhere_in_the_result(config):
    check_residual(
        (40, 33, 17), some_rows(40, 27), torch.float16, torch.float16,
        signed=False, lost=torch.nan, config=config,
    )  # fmt: skip


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("row", [0, 39])
def test_what_is_not_finite_reaches_the_result(bad, row):
    x, g = operands(40, 33, 17, torch.float32)
    x[row, 3] = bad
    memory = new_memory(40, 33, 17, torch.float32)
    result = residual_gemm(memory, x, g, torch.arange(40), scalar(CARRY), scalar(SEED), scalar(0.0))
    assert not result[:, 3].isfinite().any()
    assert result[:, :3].isfinite().all()
    assert result[:, 4:].isfinite().all()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bias_grad", [False, True])
def test_a_step_equals_update_and_gemm_apart(signed, bias_grad):
    check_fused_step(signed=signed, bias_grad=bias_grad)
