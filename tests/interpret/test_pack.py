"""Selected rows side by side, with their memory."""

import pytest
import torch

from memaop_triton.kernels.gpu import pack
from tests.judging import LAYOUTS, drawn_blocks
from tests.kernel_checks import check_packed
from tests.pairwise import pairwise

# M, N, P, K
SHAPES = [(1, 1, 1, 1), (17, 3, 1, 17), (50, 33, 300, 20), (100, 257, 48, 64), (10, 33, 17, 0)]


@pytest.mark.parametrize(
    ("shape", "dtype", "stored", "layout"),
    pairwise(SHAPES, [torch.float16, torch.float32], [torch.float16, torch.float32], LAYOUTS),
)
@pytest.mark.parametrize("signed", [False, True])
def test_shapes(shape, dtype, stored, layout, signed):
    *sizes, k = shape
    indices = torch.randperm(shape[0])[:k].sort().values
    indices = indices.to(torch.int32 if signed else torch.int64)
    check_packed(sizes, indices, dtype, stored, layout, signed=signed)


@pytest.mark.parametrize(("rows", "block_rows", "blocks"), [(70, 16, [1, 4]), (5, 32, [0])])
def test_rows_that_a_last_block_lacks_are_zero(rows, block_rows, blocks):
    indices = drawn_blocks(blocks, block_rows)
    check_packed((rows, 33, 17), indices, torch.float32, torch.float32, signed=True)


def test_each_number_is_moved_once(traffic):
    rows, n, p, k = 64, 512, 256, 16
    x, g = torch.randn(rows, n).half(), torch.randn(rows, p).half()
    memory = (x.clone(), g.clone(), torch.ones(rows, dtype=torch.bool))
    pack.pack_rows(memory, x, g, torch.arange(k), 0.5, 1)
    (launch,) = traffic
    assert launch.read["x_ptr"] == launch.read["mx_ptr"] == launch.written["px_ptr"] == 2 * k * n
    assert launch.read["g_ptr"] == launch.read["mg_ptr"] == launch.written["pg_ptr"] == 2 * k * p
