"""The distinct bytes that each kernel and each whole step moves: nothing that is not needed.

Unit of a step: one pass over X and G, M(N+P) elements. dW and the parts of a split are left out,
which cost P·N whatever M is.
"""

from dataclasses import replace

import pytest
import torch

from memaop_triton import MemAOPConfig, Subspace, new_memory
from memaop_triton.backward.weight_grad import weight_and_bias_grad
from memaop_triton.kernels.gpu import subspace
from memaop_triton.kernels.gpu.gather_gemm import gather_gemm
from memaop_triton.kernels.gpu.residual_gemm import residual_gemm
from memaop_triton.kernels.gpu.score import accumulate_and_score, accumulate_rest, row_scores
from tests.judging import SMALL, drawn_blocks
from tests.judging import operands as some_operands
from tests.kernel_checks import TILE, scalar
from tests.schemes import flat_config

M, N, P, K = 256, 128, 192, 40
X, G = M * N * 2, M * P * 2  # bytes of the operands, which are float16, and of a memory's halves
WHOLE = replace(SMALL, block_n=64, block_p=32, block_k=32)
CARRY, SEED = scalar(1.0), scalar(1)


def operands():
    return some_operands(M, N, P, torch.float16)


def some_rows():
    """K row numbers, and which rows these are."""
    rows = torch.randperm(M)[:K].sort().values
    return rows, torch.zeros(M, dtype=torch.bool).index_fill(0, rows, True)


@pytest.mark.parametrize("bias_grad", [False, True])
def test_scores(bias_grad, traffic):
    row_scores(*operands(), bias_grad=bias_grad, config=TILE)
    (launch,) = traffic
    assert launch.read == {"x_ptr": X, "g_ptr": G}
    sums = {"sums_ptr": 4 * P * M // TILE.block_m} if bias_grad else {}
    assert launch.written == {"scores_ptr": 4 * M} | sums


@pytest.mark.parametrize("split", [1, 2])
def test_gather_gemm(split, traffic):
    c, e = torch.randn(P, 5), torch.randn(N, 5).half()
    gather_gemm(
        *operands(), some_rows()[0], torch.ones(K),
        correction=(c, e), config=replace(WHOLE, split_k=split),
    )  # fmt: skip
    operand = {"x_ptr": K * N * 2, "g_ptr": K * P * 2, "index_ptr": 8 * K, "weight_ptr": 2 * K}
    corrected = {"c_ptr": c.numel() * 4, "e_ptr": e.numel() * 2}
    assert traffic[0].read == operand | corrected | {"scale_ptr": 4}
    assert traffic[0].written == {"out_ptr": N * P * (2 if split == 1 else 2 * 4)}
    if split == 2:
        assert traffic[1].read == {"parts_ptr": 2 * N * P * 4}
        assert traffic[1].written == {"out_ptr": N * P * 2}


def test_blocks_by_descriptor(tensor_copies, traffic):
    indices = drawn_blocks([0, 3], 32)
    gather_gemm(*operands(), indices, torch.ones(64), block_rows=32, config=WHOLE)
    (launch,) = traffic
    assert launch.read["x_desc"] == 64 * N * 2
    assert launch.read["g_desc"] == 64 * P * 2
    assert launch.read["index_ptr"] == 2 * 8, "one number for a block"
    assert launch.read["weight_ptr"] == 2 * 2


@pytest.mark.parametrize("filled", [False, True])
def test_update(filled, traffic):
    memory = (*operands(), torch.full((M,), filled))
    accumulate_and_score(memory, *operands(), CARRY, SEED, signed=True, config=TILE)
    (launch,) = traffic
    old = {"mx_ptr": X, "mg_ptr": G} if filled else {}
    small = {"filled_ptr": M, "carry_ptr": 4, "seed_ptr": 8}
    assert launch.read == {"x_ptr": X, "g_ptr": G} | old | small
    assert launch.written == {"mx_ptr": X, "mg_ptr": G, "filled_ptr": M, "scores_ptr": 4 * M}


@pytest.mark.parametrize("bias_grad", [False, True])
def test_update_of_the_rest(bias_grad, traffic):
    memory = (*operands(), torch.ones(M, dtype=torch.bool))
    _, taken = some_rows()
    accumulate_rest(
        memory, *operands(), CARRY, SEED, taken, scalar(0.0), bias_grad=bias_grad, config=TILE
    )
    (launch,) = traffic
    x, g = (M - K) * N * 2, (M - K) * P * 2
    assert launch.read["x_ptr"] == launch.read["mx_ptr"] == launch.written["mx_ptr"] == x
    assert launch.read["mg_ptr"] == launch.written["mg_ptr"] == g
    assert launch.read["g_ptr"] == (G if bias_grad else g)


def test_residual_gemm(traffic):
    rows, _ = some_rows()
    filled = torch.ones(M, dtype=torch.bool).index_fill(0, rows[:10], False)
    residual_gemm((*operands(), filled), *operands(), rows, CARRY, SEED, scalar(0.0), config=WHOLE)
    (launch,) = traffic
    small = {"filled_ptr": K, "carry_ptr": 4, "index_ptr": 8 * K, "lost_ptr": 4}
    carried = {"mx_ptr": (K - 10) * N * 2, "mg_ptr": (K - 10) * P * 2}
    assert launch.read == {"x_ptr": K * N * 2, "g_ptr": K * P * 2} | carried | small
    assert launch.written == {"out_ptr": N * P * 2}


def test_projection(traffic):
    (x, g), q = operands(), torch.randn(N, 5).half()
    z, rest = subspace.project(x, q, 8.0, config=TILE)
    subspace.project_gradient(g, z, rest, config=replace(TILE, split=2))
    project, transposed, combine = traffic
    assert project.read == {"x_ptr": X, "q_ptr": N * 5 * 2}
    assert project.written == {"z_ptr": M * 5 * 2, "rest_ptr": 4 * M}
    assert transposed.read == {"a_ptr": G, "z_ptr": M * 5 * 2}
    tiles = P // TILE.block_c
    assert transposed.written == {"parts_ptr": 2 * P * 5 * 4, "squares_ptr": tiles * M * 4}
    assert combine.moved == tiles * M * 4 + 8 * M


# Whole steps. ------------------------------------------------------------------------------------

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
        x, g = operands()
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
    return moved / (X + G)


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
