"""What the compiler makes of the kernels that refresh a basis, on every target."""

import pytest
import torch
import triton

from bench.microscope.building import REPORTED
from bench.microscope.compiling import compile_call
from bench.microscope.kernel_report import version_of_page
from bench.microscope.reading import read_all
from memaop_triton.kernels.gpu.orthonormal import orthonormalise_
from memaop_triton.kernels.targets import TARGETS


@pytest.mark.parametrize("rank", [5, 64])
@pytest.mark.parametrize("target", REPORTED)
def test_nothing_spills_and_products_are_exact(target, rank):
    """With other versions than the report's, whose assemblers differ, two values may spill."""
    spare = 0 if triton.__version__ == version_of_page() else 8
    q, product = torch.empty(rank, 4096).t(), torch.empty(4096, rank)
    due, also = torch.ones(1, dtype=torch.bool), torch.empty(4096, rank, dtype=torch.bfloat16)
    launches = [
        launch
        for given in ({"is_due": due, "also": also}, {})
        for launch in compile_call(
            lambda given=given: orthonormalise_(q, product, **given), TARGETS[target]
        )
    ]
    assert [one.launch.name for one in launches] == 2 * ["gram_kernel", *4 * ["round_kernel"]]
    for one, counts in zip(launches, read_all(launches), strict=True):
        assert counts.stack <= spare, one.launch.name
        assert counts.spills == 0 or spare, one.launch.name
        assert one.shared <= TARGETS[target].shared_memory
        if TARGETS[target].backend == "cuda":
            assert not counts.matrix, "float32 is rounded to tf32"
        else:
            assert all(name.endswith("f32") and "xf32" not in name for name in counts.matrix)
