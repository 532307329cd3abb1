"""Packed rows as compiled: values in every dtype, bounds, races."""

import pytest
import torch

from tests.judging import drawn_blocks
from tests.kernel_checks import check_packed

pytestmark = pytest.mark.parametrize("gpu", [80], indirect=True, ids=["sm_80"])


@pytest.mark.parametrize("layout", ["plain", "transposed", "padded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values(dtype, layout):
    stored = torch.float32 if layout == "padded" else dtype
    indices = torch.randperm(61)[:50].sort().values
    check_packed((61, 33, 300), indices, dtype, stored, layout, signed=True, device="cuda")


@pytest.mark.parametrize(("rows", "block_rows", "blocks"), [(70, 16, [1, 4]), (5, 32, [0])])
def test_blocks(rows, block_rows, blocks):
    indices = drawn_blocks(blocks, block_rows)
    check_packed(
        (rows, 33, 17), indices, torch.bfloat16, torch.bfloat16, signed=False, device="cuda"
    )
