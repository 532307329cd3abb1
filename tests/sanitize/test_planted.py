"""The test of the test: faults of each kind, planted in small kernels, are caught."""

import pytest
import torch
import triton
import triton.language as tl

from memaop_triton.kernels.gpu.launch import launch
from tests.judging import as_good_as, laid_out

pytestmark = pytest.mark.parametrize("gpu", [80], indirect=True, ids=["sm_80"])
BLOCK = 16


@triton.jit
def copy(x, out, n, BLOCK: tl.constexpr, READ_ALL: tl.constexpr, WRITE_ALL: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < n
    value = tl.load(x + at, mask=here | READ_ALL, other=0.0)
    tl.store(out + at, value, mask=here | WRITE_ALL)


@triton.jit
def accumulate(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(out + at) + tl.load(x + tl.program_id(0) * BLOCK + at))


def copied(x, n, size=20, **faults):
    out = torch.empty(size, device="cuda")
    options = {"READ_ALL": False, "WRITE_ALL": False} | faults
    launch(copy, (triton.cdiv(n, BLOCK),), x=x, out=out, n=n, BLOCK=BLOCK, **options)
    return out


@pytest.mark.parametrize(
    ("fault", "kind", "line"),
    [
        ("READ_ALL", "oob_read", "tl.load(x + at, "),
        ("WRITE_ALL", "oob_write", "tl.store(out + at, value, "),
    ],
)
def test_out_of_bounds(gpu, fault, kind, line):
    x = torch.randn(20, device="cuda")
    assert torch.equal(copied(x, 20), x)
    with gpu.caught(kind, line=line):
        copied(x, 20, **{fault: True})


def test_reads_beside_a_part_of_a_tensor_and_unwritten_output_show():
    whole, x = laid_out(torch.randn(4, 20, device="cuda"), "padded"), torch.randn(20, device="cuda")
    assert copied(whole[0], 32, 32, READ_ALL=True)[20:].isnan().any()
    with pytest.raises(AssertionError, match="never written"):
        as_good_as(copied(x, 16), x, x.double())


def test_two_programs_accumulate_without_atomics(gpu):
    x, out = torch.randn(4, BLOCK, device="cuda"), torch.zeros(BLOCK, device="cuda")
    with gpu.caught("race", line="tl.store(out + at"):
        launch(accumulate, (4,), x=x, out=out, BLOCK=BLOCK)
