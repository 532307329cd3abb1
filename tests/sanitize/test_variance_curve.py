"""Variance curves as compiled: values in every dtype, bounds, races."""

import pytest
import torch

from tests.curve_checks import check_curves

pytestmark = pytest.mark.parametrize("gpu", [80], indirect=True, ids=["sm_80"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "rank", "first_rank"), [(1, 1, 1), (45, 6, 0), (600, 9, 9)])
def test_values(rows, rank, first_rank, dtype):
    weighted = rank != 9
    check_curves(rows, rank, dtype, first_rank=first_rank, weighted=weighted, device="cuda")
