"""What a whole step moves between memory and chip, and how many kernels it launches.

Unit: one pass over X and G, M(N+P) elements. Every launch counts the distinct bytes it reads and
writes, dW and the parts of a split left out, which cost P·N whatever M is.
"""

import pytest
import torch

from memaop_triton import MemAOPConfig, Subspace, new_memory
from memaop_triton.backward.weight_grad import weight_and_bias_grad
from tests.schemes import flat_config

M, N, P, K = 256, 128, 192, 32
UNIT = M * (N + P) * 4
PATHS = {
    "none": ({"selection": "topk", "memory": "none"}, 1 + K / M),
    "none, weighted": ({"selection": "priority", "memory": "none"}, 1 + K / M),
    "rows": ({"selection": "topk", "memory": "residual"}, 3 + K / M),
    "rows, signed": ({"selection": "weightedk", "memory": "signed"}, 3 + K / M),
    "rows, unscored": ({"selection": "randk", "memory": "residual"}, 3 - K / M),
}


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("MEMAOP_TRITON_BACKEND", "triton")


@pytest.fixture
def launches_of(traffic):
    """The launches of a step in the middle of training, when every slot of a memory is filled."""

    def run(config, *, bias_grad=False):
        x, g = torch.randn(M, N), torch.randn(M, P)
        memory = new_memory(config, N, P)
        if config.row_memory:
            memory.slots(M, x)[2].fill_(True)
        elif memory is not None:
            memory.begin_step(x, g, config)
        before = len(traffic)
        weight_and_bias_grad(x, g, config, memory, bias_grad=bias_grad)
        return traffic[before:]

    return run


def units(launches):
    """Passes over X and G that some launches come to."""
    moved = 0
    for launch in launches:
        if launch.kernel == "sum_parts_kernel":
            continue
        result = launch.written if "gemm" in launch.kernel else {}
        sizes = [*launch.read.items(), *launch.written.items()]
        moved += sum(size for name, size in sizes if name not in result)
    return moved / UNIT


@pytest.mark.parametrize("path", PATHS)
def test_passes_over_the_operands(path, launches_of):
    scheme, expected = PATHS[path]
    assert units(launches_of(flat_config(k=K, **scheme))) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("side", ["input", "grad"])
def test_passes_of_the_subspace(side, launches_of):
    launches = launches_of(MemAOPConfig(k=K, memory=Subspace(rank=4, side=side, refresh_every=100)))
    assert 1 + K / M < units(launches) <= 1.5 + K / M


@pytest.mark.parametrize(
    ("scheme", "kernels"),
    [
        ({"selection": "priority", "memory": "none"}, ["score", "gather_gemm"]),
        ({"selection": "topk", "memory": "signed"}, ["accumulate", "gather_gemm"]),
        ({"selection": "randk", "memory": "residual"}, ["accumulate", "residual_gemm"]),
        *(
            (
                {"side": side},
                ["project", "transposed", "combine", "gather_gemm", "sum_parts", "gather_gemm"],
            )
            for side in ("input", "grad")
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias_grad", [False, True])
def test_launches(scheme, kernels, bias_grad, launches_of):
    launches = launches_of(flat_config(k=K, **scheme), bias_grad=bias_grad)
    names = [launch.kernel.removesuffix("_kernel") for launch in launches]
    # A split adds the sum of its parts.
    assert [n for n in names if n != "sum_parts"] == [n for n in kernels if n != "sum_parts"]
    assert names.count("sum_parts") <= kernels.count("sum_parts") + kernels.count("gather_gemm")
