"""Rescaling a memory as compiled, bfloat16 included."""

import pytest
import torch

from memaop_triton.kernels.gpu.rescale import rescale_
from memaop_triton.kernels.tuning.config import RowConfig

pytestmark = pytest.mark.parametrize("gpu", [80], indirect=True, ids=["sm_80"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("factor", [1.0, 0.5, 4.0])
def test_powers_of_two_are_exact(dtype, factor):
    m = torch.randn(21, 33, device="cuda").to(dtype)
    expected = m.clone() * factor
    rescale_(m, torch.tensor([factor], device="cuda"), config=RowConfig(8, 16, 4))
    assert torch.equal(m, expected)
