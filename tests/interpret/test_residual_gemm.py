"""The fused residual GEMM, against its formula in float64."""

from dataclasses import replace

import pytest
import torch

from memaop_triton.kernels.gpu.gather_gemm import gather_gemm
from memaop_triton.kernels.gpu.residual_gemm import residual_gemm
from tests.judging import LAYOUTS, SMALL, drawn_blocks, operands
from tests.kernel_checks import CARRY, SEED, check_residual, new_memory, scalar
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


@pytest.mark.parametrize(
    ("shape", "config", "dtype", "layout"),
    pairwise(SHAPES, CONFIGS, [torch.float16, torch.float32], LAYOUTS),
)
def test_shapes(shape, config, dtype, layout):
    """A lost row is everywhere in the result."""
    (*sizes, k), signed = shape, config != "whole"
    indices = torch.randperm(shape[0])[:k].sort().values
    indices = indices.to(torch.int32 if signed else torch.int64)
    stored, config = torch.float32 if signed else dtype, CONFIGS[config]
    for lost in (0.0, torch.nan):
        check_residual(
            sizes, indices, dtype, stored, layout, signed=signed, lost=lost, config=config
        )


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


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("row", [0, 39])
def test_what_is_not_finite_reaches_the_result(bad, row):
    x, g = operands(40, 33, 17, torch.float32)
    x[row, 3] = bad
    memory, rows = new_memory(40, 33, 17, torch.float32), torch.arange(40)
    for result in (
        gather_gemm(x, g, rows),
        residual_gemm(memory, x, g, rows, scalar(CARRY), scalar(SEED), scalar(0.0)),
    ):
        assert not result[:, 3].isfinite().any()
        assert result[:, :3].isfinite().all()
        assert result[:, 4:].isfinite().all()
