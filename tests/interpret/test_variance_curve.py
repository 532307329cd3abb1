"""Variance curves by the Triton kernel."""

import pytest
import torch

from memaop_triton.kernels.gpu.variance_curve import variance_curves_
from memaop_triton.sampling.variance import POINTS
from tests.curve_checks import check_curves


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("rows", "rank", "first_rank"), [(1, 1, 1), (33, 4, 4), (700, 6, 0), (2047, 17, 0)]
)
def test_values(rows, rank, first_rank, weighted, dtype):
    check_curves(rows, rank, dtype, first_rank=first_rank, weighted=weighted)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_shows(bad):
    rest, curves = torch.ones(40), torch.zeros(1, 2, POINTS)
    rest[3] = bad
    settings = {"first_rank": 2, "step": 4, "threshold": 64.0}
    variance_curves_(curves, torch.ones(40, 2), rest, None, 1.0, **settings)
    assert not curves.isfinite().all()
    variance_curves_(curves, torch.zeros(40, 2), torch.zeros(40), None, 1.0, **settings)
    assert (curves == 0).all()


def test_more_rows_than_a_program_holds_are_refused():
    z, rest, curves = torch.ones(2049, 2), torch.ones(2049), torch.zeros(1, 2, POINTS)
    with pytest.raises(ValueError, match="2049 rows"):
        variance_curves_(curves, z, rest, None, 1.0, first_rank=2, step=4, threshold=64.0)
