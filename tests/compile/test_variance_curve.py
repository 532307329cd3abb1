"""What the compiler makes of the kernel of variance curves, on every target."""

import pytest
import torch

from bench.microscope.building import REPORTED
from bench.microscope.compiling import compile_call
from bench.microscope.reading import read_all
from memaop_triton.kernels.gpu.variance_curve import variance_curves_
from memaop_triton.kernels.targets import TARGETS
from memaop_triton.sampling.variance import POINTS


@pytest.mark.parametrize("target", REPORTED)
def test_nothing_spills(target):
    settings = {"scale": 64.0, "first_rank": 0, "step": 4, "threshold": 64.0}
    launches = [
        launch
        for rows in (100, 2047)
        for norms in (None, torch.empty(rows))
        for launch in compile_call(
            lambda rows=rows, norms=norms: variance_curves_(
                torch.empty(17, 2, POINTS),
                torch.empty(rows, 64, dtype=torch.bfloat16),
                torch.empty(rows),
                norms,
                **settings,
            ),
            TARGETS[target],
        )
    ]
    assert len(launches) == 4
    for counts in read_all(launches):
        assert counts.spills == counts.stack == 0
