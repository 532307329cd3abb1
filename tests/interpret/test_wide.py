"""Rows so far apart that their offsets exceed 32 bits, in memory of which few pages are real."""

import mmap

import pytest
import torch

from memaop_triton.kernels.gpu import subspace
from memaop_triton.kernels.gpu.gather_gemm import gather_gemm
from memaop_triton.kernels.gpu.residual_gemm import residual_gemm
from memaop_triton.kernels.gpu.score import accumulate_and_score, row_scores
from memaop_triton.kernels.tuning.config import RowConfig
from tests import traffic
from tests.judging import SMALL, as_good_as, check_products

TILE = RowConfig(16, 32, 4)
ROWS, STRIDE = 3, 1 << 30


class Bounds:
    """In place of a mark for every byte, which would be gigabytes: the number of bytes."""

    def __init__(self, size):
        self.size = size

    def __setitem__(self, touched, mark):
        pass

    def sum(self):
        return 0


@pytest.fixture(autouse=True)
def _uncounted(monkeypatch):
    """Launches are held to the bounds of their tensors, but what they move is not added up."""

    def add(meter, name, value):
        tensor = getattr(value, "base", value)
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            meter.buffers[name] = (storage.data_ptr(), *[Bounds(storage.nbytes())] * 2)

    monkeypatch.setattr(traffic._Meter, "_add", add)


@pytest.fixture
def wide(tmp_path):
    """Makes [3, columns] of normal numbers, 2³⁰ elements from row to row or column to column."""

    def make(columns, by_columns=False):
        size = 2 * (2 * STRIDE + ROWS * columns)
        with (tmp_path / str(len(list(tmp_path.iterdir())))).open("w+b") as file:
            file.truncate(size)  # to holes, which take no room on the disk
            whole = torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.float16)
        strides = (1, STRIDE) if by_columns else (STRIDE, 1)
        return whole.as_strided((ROWS, columns), strides).copy_(torch.randn(ROWS, columns))

    return make


@pytest.mark.parametrize("by_columns", [False, True])
def test_passes_over_rows(by_columns, wide):
    a = wide(3 if by_columns else 33, by_columns)
    norms, exact = (
        torch.linalg.vector_norm(a.to(t), dim=1) for t in (torch.float32, torch.float64)
    )
    as_good_as(row_scores(a, a, config=TILE)[0], norms**2, exact**2)
    q = torch.linalg.qr(torch.randn(a.shape[1], 2)).Q.half().contiguous()
    z, _ = subspace.project(a, q, 1.0, config=TILE)
    as_good_as(z, a @ q, a.double() @ q.double())
    product = subspace.transposed_mm(z, a, config=TILE)
    as_good_as(product, a.T.float() @ z.float(), a.T.double() @ z.double())


def test_update(wide):
    x, memory = wide(33), (wide(33), wide(33), torch.ones(ROWS, dtype=torch.bool))
    exact = [m.double() + x.double() for m in memory[:2]]
    one, seed = torch.ones(1), torch.ones(1, dtype=torch.int64)
    indices = torch.arange(ROWS)
    result = residual_gemm(memory, x, x, indices, one, seed, torch.zeros(1), config=SMALL)
    as_good_as(result, (exact[1].half().T @ exact[0].half()), exact[1].T @ exact[0])
    accumulate_and_score(memory, x, x, one, seed, config=TILE)
    for m, right in zip(memory, exact, strict=False):
        as_good_as(m, right.half(), right)


@pytest.mark.parametrize("x_by_columns", [False, True])
@pytest.mark.parametrize("g_by_columns", [False, True])
def test_gather_gemm(x_by_columns, g_by_columns, wide):
    x, g = wide(3, x_by_columns), wide(3, g_by_columns)
    for dtype in (torch.int32, torch.int64):
        indices = torch.arange(ROWS, dtype=dtype)
        check_products(gather_gemm(x, g, indices, config=SMALL), x, g, indices)


def test_blocks_by_descriptor(wide, tensor_copies):
    x, g = wide(32), wide(32)
    indices = torch.arange(16)
    check_products(gather_gemm(x, g, indices, block_rows=16, config=SMALL), x, g, indices)
