"""The distinct bytes that a whole step moves, and the kernels it launches: no superfluous ones.

Unit: one pass over X and G, M(N+P) elements. dW and the parts of a split are left out, which cost
P·N whatever M is.
"""

from dataclasses import replace

import pytest
import torch

from memaop_triton import new_memory
from memaop_triton.backward.weight_grad import weight_and_bias_grad
from memaop_triton.kernels.gpu.gather_gemm import gather_gemm
from tests.judging import SMALL, drawn_blocks
from tests.judging import operands as some_operands
from tests.schemes import flat_config

M, N, P, K = 256, 128, 192, 40
X, G = M * N * 2, M * P * 2  # bytes of the operands, which are float16, and of a memory's halves
TAKEN = K / M
# By the scheme: its kernels, and its passes where all slots of a memory are filled. The correction
# of a subspace reads the rows taken of the side that it is not of once more.
NO_MEMORY, ROW_MEMORY = ["score", "select", "gather_gemm"], ["accumulate", "select", "gather_gemm"]
SUBSPACE = ["project", "transposed", "combine", "select", "gather_gemm", "gather_gemm"]
STEPS = {
    "topk-none": (NO_MEMORY, 1 + TAKEN),
    "priority-none": (NO_MEMORY, 1 + TAKEN),
    "topk-residual": (ROW_MEMORY, 3 + TAKEN),
    "weightedk-signed": (ROW_MEMORY, 3 + TAKEN),
    "randk-residual": (["select", "pack", "accumulate"], 3 - TAKEN),
    "priority-subspace-input": (SUBSPACE, 1 + TAKEN * (1 + P / (N + P))),
    "priority-subspace-grad": (SUBSPACE, 1 + TAKEN * (1 + N / (N + P))),
}


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("MEMAOP_TRITON_BACKEND", "triton")


def operands():
    return some_operands(M, N, P, torch.float16)


def passes_of(launches):
    """Passes over X and G that some launches come to: in rows of both or of a memory, in others."""
    of_rows = others = 0
    for launch in launches:
        if launch.kernel == "add_up_kernel":
            continue
        for name, size in [*launch.read.items(), *launch.written.items()]:
            if name in ("x_ptr", "g_ptr", "a_ptr", "mx_ptr", "mg_ptr"):
                of_rows += size
            elif name != "out_ptr":
                others += size
    return of_rows / (X + G), others / (X + G)


@pytest.mark.parametrize("scheme", STEPS)
@pytest.mark.parametrize("filled", [1.0, 0.5])
@pytest.mark.parametrize("bias_grad", [False, True])
def test_a_step_in_the_middle_of_training(scheme, filled, bias_grad, traffic):
    kernels, passes = STEPS[scheme]
    settings = dict(zip(("selection", "memory", "side"), scheme.split("-"), strict=False))
    config = flat_config(k=K, rank=4, refresh_every=100, **settings)
    memory, (x, g) = new_memory(config, N, P), operands()
    if config.row_memory:
        memory.slots(M, x)[2].copy_(torch.arange(M) < filled * M)
        passes -= 1 - filled  # an empty slot is not read
    elif memory is not None:
        memory.begin_step(x, g, config)
    traffic.clear()
    weight_and_bias_grad(x, g, config, memory, bias_grad=bias_grad)
    # A split adds the sum of its parts, or there are column sums.
    names = [launch.kernel.removesuffix("_kernel") for launch in traffic]
    assert [name for name in names if name != "add_up"] == kernels
    assert names.count("add_up") <= max(1, kernels.count("gather_gemm"))
    if bias_grad and "pack" in kernels:  # which leaves those rows to another kernel
        passes += TAKEN * P / (N + P)
    of_rows, others = passes_of(traffic)
    assert of_rows == pytest.approx(passes, abs=0.003)
    packed = TAKEN if "pack" in kernels else 0
    assert others < packed + (0.19 if kernels == SUBSPACE else 0.09)


def test_blocks_by_descriptor(tensor_copies, traffic):
    indices = drawn_blocks([0, 3], 32)
    config = replace(SMALL, block_n=64, block_p=32, block_k=32)
    gather_gemm(*operands(), indices, torch.ones(64), block_rows=32, config=config)
    _, launch = traffic  # behind the scale of the weights
    assert launch.read["x_desc"] == 64 * N * 2
    assert launch.read["g_desc"] == 64 * P * 2
    assert launch.read["index_ptr"] == 2 * 8, "one number for a block"
    assert launch.read["weight_ptr"] == 2 * 2
