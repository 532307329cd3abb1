"""The fused residual GEMM as compiled: values in every dtype, bounds, races between its parts."""

from dataclasses import replace

import pytest
import torch

from tests.judging import SMALL, drawn_blocks
from tests.kernel_checks import check_residual

pytestmark = pytest.mark.parametrize("gpu", [80], indirect=True, ids=["sm_80"])


@pytest.mark.parametrize("layout", ["plain", "transposed", "padded"])
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values(dtype, split, layout):
    stored = torch.float32 if layout == "padded" else dtype
    indices = torch.randperm(61)[:50].sort().values
    config = replace(SMALL, split_k=split)
    check_residual(
        (61, 33, 32), indices, dtype, stored, layout, signed=False, config=config, device="cuda"
    )


@pytest.mark.parametrize(("rows", "block_rows", "blocks"), [(70, 16, [1, 4]), (5, 32, [0])])
@pytest.mark.parametrize("lost", [0.0, torch.nan])
def test_blocks(rows, block_rows, blocks, lost):
    check_residual(
        (rows, 33, 17), drawn_blocks(blocks, block_rows), torch.bfloat16, torch.bfloat16,
        signed=False, lost=lost, block_rows=block_rows, config=replace(SMALL, split_k=2),
        device="cuda",
    )  # fmt: skip
