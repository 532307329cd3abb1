"""Rows in a few bits as compiled: values in every dtype, bounds, races."""

import pytest
import torch

from tests.compiled import needs_compiler
from tests.kernel_checks import scalar
from tests.stash_checks import SEED, check_extremes, check_not_finite, check_rounded

pytestmark = pytest.mark.parametrize("gpu", [80], indirect=True, ids=["sm_80"])
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "bits", "layout", "rank"),
    [
        ((33, 128), 4, "plain", 0),
        ((33, 128), 8, "plain", 5),
        ((40, 127), 4, "padded", 3),
        ((40, 127), 8, "transposed", 0),
        ((9, 35), 4, "strided", 0),
    ],
)
def test_values(shape, bits, layout, rank, dtype):
    check_rounded(shape, bits, dtype, layout, rank=rank, device="cuda")


@needs_compiler
@pytest.mark.parametrize("bits", [4, 8])
def test_the_same_seed_stores_the_same_as_in_c(bits):
    check_rounded((35, 111), bits, torch.bfloat16, rank=3, compare=True, device="cuda")


def test_the_seed_may_lie_on_the_device():
    check_rounded((33, 64), 4, torch.bfloat16, seed=scalar(SEED, "cuda"), device="cuda")


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_that_are_not_finite_and_extreme_ones(bits):
    check_not_finite(bits, torch.bfloat16, "cuda")
    check_extremes(bits, torch.bfloat16, "cuda")
    check_not_finite(bits, torch.float32, "cuda")
