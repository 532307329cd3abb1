"""The selection kernels as compiled: values, bounds, races between programs."""

import pytest
import torch

from tests.selecting import check_bernoulli, check_selection, share_among_programs

pytestmark = pytest.mark.parametrize("gpu", [80], indirect=True, ids=["sm_80"])


@pytest.mark.parametrize("block_rows", [1, 4])
@pytest.mark.parametrize("policy", ["topk", "priority", "randk", "uniform", "weightedk"])
@pytest.mark.parametrize("several", [False, True], ids=["one program", "several"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_and_weights(policy, block_rows, several, dtype, monkeypatch):
    if several:
        share_among_programs(monkeypatch)
    check_selection(policy, block_rows, dtype, device="cuda")


@pytest.mark.parametrize("several", [False, True], ids=["one program", "several"])
def test_bernoulli(several, monkeypatch):
    if several:
        share_among_programs(monkeypatch)
    check_bernoulli(device="cuda")
