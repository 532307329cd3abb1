"""What the compiler makes of the selection kernels, on every target."""

import pytest
import torch

from bench.microscope.building import REPORTED
from bench.microscope.compiling import compile_call
from bench.microscope.reading import read_all
from memaop_triton.kernels.gpu import select
from memaop_triton.kernels.targets import TARGETS


@pytest.mark.parametrize(
    ("rows", "block_rows"),
    [(100, 1), (select.ONE_PROGRAM, 1), (select.ONE_PROGRAM, 16), (4096, 128), (1 << 20, 1)],
)
@pytest.mark.parametrize("target", REPORTED)
def test_nothing_spills(target, rows, block_rows):
    scores, filled = torch.empty(rows), torch.empty(rows, dtype=torch.bool)
    # As in a captured graph, and out of it.
    calls = [
        {"dtype": torch.bfloat16, "seed": 1 << 62},
        {"dtype": torch.float16, "seed": torch.empty(1, dtype=torch.int64)},
    ]
    k = rows // block_rows // 8
    launches = [
        launch
        for policy in select.POLICIES
        for call in calls
        for launch in compile_call(
            lambda policy=policy, call=call: select.select(
                scores, k, policy, block_rows=block_rows, filled=filled, taken=filled, **call
            ),
            TARGETS[target],
        )
    ]
    kernels = {launch.launch.name for launch in launches}
    assert ("select_kernel" in kernels) == (rows <= select.ONE_PROGRAM)
    for launch, counts in zip(launches, read_all(launches), strict=True):
        assert counts.spills == counts.stack == 0, launch.launch.name
