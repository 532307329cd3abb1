"""The gather GEMM as compiled: values in every dtype, bounds, races between parts."""

from dataclasses import replace

import pytest
import torch

from tests.judging import SMALL
from tests.kernel_checks import check_blocks, check_gather, check_gather_correction, check_padding

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
one_gpu = pytest.mark.parametrize("gpu", [80], indirect=True, ids=["sm_80"])


@one_gpu
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "layout", "config"),
    [
        ((1, 1, 1, 1), "plain", SMALL),
        ((5, 33, 17, 0), "plain", replace(SMALL, split_k=2)),
        ((70, 33, 17, 50), "padded", replace(SMALL, tiles_n=2, split_k=2)),
        ((70, 48, 32, 64), "transposed", replace(SMALL, x_columns_first=True, split_k=3)),
    ],
)
def test_values(shape, layout, config, dtype, weighted):
    index = torch.int32 if shape[1] == 48 else torch.int64
    kind = {"index": index, "weighted": weighted, "config": config, "device": "cuda"}
    check_gather(shape, dtype, layout, **kind)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("rows", "block_rows", "blocks", "split"),
    [(70, 16, [1, 3, 4], 2), (70, 64, [1], 1), (100, 32, [0, 3], 3), (5, 16, [0], 1)],
)
def test_blocks(rows, block_rows, blocks, split, weighted):
    kind = {"weighted": weighted, "split": split, "device": "cuda"}
    check_blocks(rows, block_rows, blocks, torch.bfloat16, **kind)


@pytest.mark.parametrize(("blocks", "block_rows"), [(60, 1), (20, 16)])
def test_padding_is_not_read(blocks, block_rows):
    config = replace(SMALL, split_k=2)
    check_padding(blocks, block_rows, torch.bfloat16, config, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_correction(dtype):
    config = replace(SMALL, split_k=2)
    check_gather_correction(17, dtype, weighted=True, config=config, device="cuda")
