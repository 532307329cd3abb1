"""Rows so far apart that their offsets exceed 32 bits, in memory with few allocated pages."""

import mmap

import pytest
import torch

from memaop_triton.bench.suites.plain_gemm import plain_gemm
from memaop_triton.kernels.gpu import launch, subspace
from memaop_triton.kernels.gpu.gather_gemm import gather_gemm, gather_gemm_kernel
from memaop_triton.kernels.gpu.pack import pack_rows
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
    """Makes [rows, columns] of normal numbers, with `stride` elements from row to row (column)."""

    def make(columns, by_columns=False, *, rows=ROWS, stride=STRIDE):
        lines, line = (columns, rows) if by_columns else (rows, columns)
        with (tmp_path / str(len(list(tmp_path.iterdir())))).open("w+b") as file:
            # To holes, which take no room on the disk.
            file.truncate(2 * ((lines - 1) * stride + line))
            whole = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.float16)
        strides = (1, stride) if by_columns else (stride, 1)
        return whole.as_strided((rows, columns), strides).copy_(torch.randn(rows, columns))

    return make


@pytest.mark.parametrize("by_columns", [False, True])
def test_passes_over_rows(by_columns, wide):
    a = wide(3 if by_columns else 33, by_columns)
    norms, exact = (
        torch.linalg.vector_norm(a.to(t), dim=1) for t in (torch.float32, torch.float64)
    )
    as_good_as(row_scores(a, a, config=TILE)[0], norms**2, exact**2)
    q = torch.linalg.qr(torch.randn(a.shape[1], 2)).Q.half().contiguous()
    z, _, _ = subspace.project(a, q, 1.0, config=TILE)
    as_good_as(z, a @ q, a.double() @ q.double())
    product = subspace.transposed_mm(z, a, config=TILE)
    as_good_as(product, a.T.float() @ z.float(), a.T.double() @ z.double())


@pytest.mark.parametrize("which", ["operands", "memory"])
def test_update(which, wide):
    x, *slots = wide(33), wide(33), wide(33)
    if which == "memory":
        x = x.contiguous()
    else:
        slots = [m.contiguous() for m in slots]
    memory = (*slots, torch.ones(ROWS, dtype=torch.bool))
    exact = [m.double() + x.double() for m in memory[:2]]
    one, seed = torch.ones(1), torch.ones(1, dtype=torch.int64)
    indices = torch.arange(ROWS)
    for packed, right in zip(pack_rows(memory, x, x, indices, one, seed), exact, strict=True):
        as_good_as(packed, right.half(), right)
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


# The contiguous matrices of q columns, q being so large here that their rows need 64 bits. A real q
# is at most 64, and then millions of rows would be needed: the kernels take it for a stride and a
# bound alike, of which a tile holds the first sixteen columns.


def test_long_matrices_of_the_subspace(wide):
    count, stride = 33, 1 << 26
    x = torch.randn(count, count).half()
    q, z, parts = (wide(16, rows=count, stride=stride) for _ in range(3))
    shared = {"M": count, "N": count, "rank": stride, "EVEN": False, "WIDE": True}
    shared |= {"BLOCK_M": 16, "BLOCK_C": 16, "RANK": 16, "PRECISION": "ieee"}
    launch.launch(
        subspace.project_kernel,
        (3,),
        x_ptr=x, q_ptr=q, z_ptr=z.fill_(torch.nan), rest_ptr=torch.empty(count), sums_ptr=None,
        scale=1.0, epsilon=0.0, x_row=count, x_col=1, q_row=stride, SUMS=False, **shared,
    )  # fmt: skip
    as_good_as(z, x @ q, x.double() @ q.double())
    launch.launch(
        subspace.transposed_kernel,
        (3, 1),
        a_ptr=x, z_ptr=z, parts_ptr=parts.fill_(torch.nan), squares_ptr=None, sums_ptr=None,
        a_row=count, a_col=1, z_row=stride, SPLIT=1, NORMS=False, SUMS=False, **shared,
    )  # fmt: skip
    as_good_as(parts, x.T @ z, x.T.double() @ z.double())


def test_long_matrices_of_a_correction(wide):
    x = torch.zeros(ROWS, 3).half()
    c, e, out = wide(16), wide(16), torch.full((3, 3), torch.nan)
    launch.launch(
        gather_gemm_kernel,
        (1, 1),
        x_ptr=x, g_ptr=x, index_ptr=torch.arange(ROWS), weight_ptr=None, scale_ptr=None,
        c_ptr=c, q_ptr=e, q_scale=1.0, out_ptr=out,
        M=ROWS, N=3, P=3, K=ROWS, steps=0, rank=STRIDE, q_row=STRIDE,
        x_row=3, x_col=1, g_row=3, g_col=1,
        BLOCK_N=16, TILES=1, BLOCK_P=16, BLOCK_K=16, SPLIT_K=1, GROUP=1,
        EVEN_N=False, EVEN_P=False, WIDE=False, WEIGHTED=False, PADDED=False, SCALED=False,
        RANK=16, Q_OF_G=False, PRECISION="ieee", X_COLUMNS_FIRST=False,
    )  # fmt: skip
    as_good_as(out, c @ e.T, c.double() @ e.double().T)


@pytest.mark.parametrize("rows", [1 << 27, (1 << 27) - 1])
def test_long_matrices_are_told_from_others(rows, tensor_copies, monkeypatch):
    launches = []
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, **given: launches.append(given))
    x = torch.empty(rows, 32, dtype=torch.float16, device="meta")
    q = torch.empty(32, 16, dtype=torch.float16, device="meta")
    z, rest, _ = subspace.project(x, q, 4.0, config=TILE)
    subspace.project_gradient(x, z, rest, config=TILE)
    project, transposed, _ = launches
    assert project["WIDE"] == transposed["WIDE"] == (rows * 16 >= 1 << 31)


def test_strides_beyond_32_bits_and_steps_of_the_plain_gemm(wide):
    far, many = wide(33, stride=(1 << 32) + 16), wide(33, rows=20, stride=1 << 28)
    indices = torch.arange(ROWS)
    check_products(gather_gemm(far, far, indices, config=SMALL), far, far, indices)
    check_products(plain_gemm(many, many, config=SMALL), many, many, torch.arange(20))
