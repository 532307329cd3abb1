"""The distinct bytes that each kernel moves: every operand once, and nothing that is not needed."""

from dataclasses import replace

import pytest
import torch

from memaop_triton.kernels.gpu import subspace
from memaop_triton.kernels.gpu.gather_gemm import gather_gemm
from memaop_triton.kernels.gpu.residual_gemm import residual_gemm
from memaop_triton.kernels.gpu.score import (
    accumulate_and_score,
    accumulate_rest,
    row_norms,
    row_scores,
)
from memaop_triton.kernels.tuning.config import RowConfig
from tests.judging import SMALL, drawn_blocks, operands

M, N, P, K = 160, 64, 96, 40
TILE = RowConfig(16, 32, 4)
WHOLE = replace(SMALL, block_n=64, block_p=32, block_k=32)
CARRY, SEED = torch.ones(1), torch.ones(1, dtype=torch.int64)

sizes = pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 2), (torch.float32, 4)], ids=["float16", "float32"]
)


def some_rows():
    return torch.randperm(M)[:K].sort().values


def new_memory(dtype, filled):
    return (*operands(M, N, P, dtype), filled)


def marked(rows):
    return torch.zeros(M, dtype=torch.bool).index_fill(0, rows, True)


@sizes
@pytest.mark.parametrize("bias_grad", [False, True])
def test_scores(dtype, size, bias_grad, traffic):
    row_scores(*operands(M, N, P, dtype), bias_grad=bias_grad, config=TILE)
    (launch,) = traffic
    assert launch.read == {"x_ptr": M * N * size, "g_ptr": M * P * size}
    sums = {"sums_ptr": 4 * P * M // TILE.block_m} if bias_grad else {}
    assert launch.written == {"scores_ptr": 4 * M} | sums


@sizes
def test_norms(dtype, size, traffic):
    row_norms(operands(M, N, P, dtype)[0], config=TILE)
    (launch,) = traffic
    assert launch.moved == M * N * size + 4 * M


@sizes
@pytest.mark.parametrize("split", [1, 2])
def test_gather_gemm(dtype, size, split, traffic):
    x, g = operands(M, N, P, dtype)
    gather_gemm(x, g, some_rows(), torch.ones(K), config=replace(WHOLE, split_k=split))
    launch = traffic[0]
    scale = {"scale_ptr": 4} if dtype == torch.float16 else {}
    operand = {"x_ptr": K * N * size, "g_ptr": K * P * size}
    assert launch.read == operand | {"index_ptr": 8 * K, "weight_ptr": K * size} | scale
    assert launch.written == {"out_ptr": N * P * (size if split == 1 else 2 * 4)}
    if split == 2:
        assert traffic[1].read == {"parts_ptr": 2 * N * P * 4}
        assert traffic[1].written == {"out_ptr": N * P * size}


def test_correction_is_read_once(traffic):
    x, g = operands(M, N, P, torch.float16)
    c, e = torch.randn(P, 5), torch.randn(N, 5).half()
    gather_gemm(x, g, some_rows(), correction=(c, e), config=replace(WHOLE, split_k=2))
    assert traffic[0].read["c_ptr"] == c.numel() * 4
    assert traffic[0].read["e_ptr"] == e.numel() * 2


def test_blocks_by_descriptor(tensor_copies, traffic):
    x, g = operands(M, N, P, torch.float16)
    indices = drawn_blocks([0, 3], 32)
    gather_gemm(x, g, indices, torch.ones(64), block_rows=32, config=WHOLE)
    (launch,) = traffic
    assert launch.read["x_desc"] == 64 * N * 2
    assert launch.read["g_desc"] == 64 * P * 2
    assert launch.read["index_ptr"] == 2 * 8, "one number for a block"
    assert launch.read["weight_ptr"] == 2 * 2


@sizes
@pytest.mark.parametrize("filled", [False, True])
def test_update(dtype, size, filled, traffic):
    memory = new_memory(dtype, torch.full((M,), filled))
    accumulate_and_score(memory, *operands(M, N, P, dtype), CARRY, SEED, signed=True, config=TILE)
    (launch,) = traffic
    x, g = M * N * size, M * P * size
    old = {"mx_ptr": x, "mg_ptr": g} if filled else {}
    small = {"filled_ptr": M, "carry_ptr": 4, "seed_ptr": 8}
    assert launch.read == {"x_ptr": x, "g_ptr": g} | old | small
    assert launch.written == {"mx_ptr": x, "mg_ptr": g, "filled_ptr": M, "scores_ptr": 4 * M}


@sizes
@pytest.mark.parametrize("bias_grad", [False, True])
def test_update_of_the_rest(dtype, size, bias_grad, traffic):
    memory = new_memory(dtype, torch.ones(M, dtype=torch.bool))
    accumulate_rest(
        memory, *operands(M, N, P, dtype), CARRY, SEED, marked(some_rows()), torch.zeros(1),
        bias_grad=bias_grad, config=TILE,
    )  # fmt: skip
    (launch,) = traffic
    x, g = (M - K) * N * size, (M - K) * P * size
    assert launch.read["x_ptr"] == launch.read["mx_ptr"] == launch.written["mx_ptr"] == x
    assert launch.read["mg_ptr"] == launch.written["mg_ptr"] == g
    assert launch.read["g_ptr"] == (M * P * size if bias_grad else g)
    small = {"taken_ptr", "filled_ptr", "carry_ptr", "seed_ptr"}
    assert launch.read.keys() <= {"x_ptr", "g_ptr", "mx_ptr", "mg_ptr"} | small


@sizes
def test_residual_gemm(dtype, size, traffic):
    rows = some_rows()
    filled = ~marked(rows[:10])
    residual_gemm(
        new_memory(dtype, filled), *operands(M, N, P, dtype), rows, CARRY, SEED, torch.zeros(1),
        config=WHOLE,
    )  # fmt: skip
    (launch,) = traffic
    carried = K - 10
    small = {"filled_ptr": K, "carry_ptr": 4, "index_ptr": 8 * K, "lost_ptr": 4}
    assert launch.read == small | {
        "x_ptr": K * N * size,
        "g_ptr": K * P * size,
        "mx_ptr": carried * N * size,
        "mg_ptr": carried * P * size,
    }
    assert launch.written == {"out_ptr": N * P * size}


@sizes
def test_projection(dtype, size, traffic):
    (x, g), q = operands(M, N, P, dtype), torch.randn(N, 5).to(dtype)
    z, rest = subspace.project(x, q, 8.0, config=TILE)
    subspace.project_gradient(g, z, rest, config=replace(TILE, split=2))
    project, transposed, combine = traffic
    assert project.read == {"x_ptr": M * N * size, "q_ptr": N * 5 * size}
    assert project.written == {"z_ptr": M * 5 * size, "rest_ptr": 4 * M}
    assert transposed.read == {"a_ptr": M * P * size, "z_ptr": M * 5 * size}
    tiles = P // TILE.block_c
    assert transposed.written == {"parts_ptr": 2 * P * 5 * 4, "squares_ptr": tiles * M * 4}
    assert combine.moved == tiles * M * 4 + 8 * M
