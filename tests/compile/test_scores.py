"""What the compiler makes of the scores from blocks of columns, and of those without X."""

import pytest
import torch

from bench.microscope.building import REPORTED
from bench.microscope.compiling import compile_call
from bench.microscope.reading import read_all
from memaop_triton.backward.scores import columns_of
from memaop_triton.kernels.gpu.score import row_norms, row_scores
from memaop_triton.kernels.targets import TARGETS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("target", REPORTED)
def test_nothing_spills(target, dtype):
    x, g = torch.empty(4096, 1024, dtype=dtype), torch.empty(4096, 768, dtype=dtype)
    parts = columns_of(x, 1), columns_of(g, 2)
    launches = [
        launch
        for call in (
            lambda: row_scores(*parts),
            lambda: row_norms(parts[1]),
            lambda: row_scores(parts[0], g, bias_grad=True),
            lambda: row_scores(None, g, bias_grad=True),
        )
        for launch in compile_call(call, TARGETS[target])
    ]
    assert {launch.launch.name for launch in launches} == {"score_kernel"}
    assert len(launches) == 4
    for counts in read_all(launches):
        assert counts.spills == counts.stack == 0
