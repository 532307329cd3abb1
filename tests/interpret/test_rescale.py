"""Rescaling a memory: exact for powers of two, and no traffic at all for 1."""

import pytest
import torch

from memaop_triton.kernels.gpu.rescale import rescale_
from memaop_triton.kernels.tuning.config import RowConfig

TILE = RowConfig(16, 32, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (17, 3), (40, 129)])
@pytest.mark.parametrize("factor", [0.5, 2.0, 0.3])
def test_values(shape, dtype, factor):
    wide = torch.randn(shape[0], shape[1] + 5).to(dtype)
    m, before = wide[:, : shape[1]], wide.clone()
    rescale_(m, torch.tensor([factor]), config=TILE)
    expected = (factor * before[:, : shape[1]].float()).to(dtype)
    torch.testing.assert_close(m, expected, rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=0)
    assert torch.equal(wide[:, shape[1] :], before[:, shape[1] :])


def test_a_factor_of_one_reads_nothing_but_the_factor(traffic):
    rescale_(torch.randn(40, 129), torch.ones(1), config=TILE)
    (launch,) = traffic
    assert launch.read.keys() == {"factor_ptr"}
    assert not launch.written


def test_rows_with_gaps_are_refused():
    with pytest.raises(ValueError, match=r"without gaps, got strides \(1, 40\)"):
        rescale_(torch.randn(129, 40).t(), torch.ones(1))
