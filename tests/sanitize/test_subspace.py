"""The subspace memory's products as compiled: values in every dtype, bounds, races."""

import pytest
import torch

from tests.kernel_checks import (
    check_gradient,
    check_projection,
    check_special_rows,
    check_whole_gradient,
)

pytestmark = pytest.mark.parametrize("gpu", [80], indirect=True, ids=["sm_80"])
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
each_shape = pytest.mark.parametrize(
    ("shape", "layout"),
    [((1, 1, 1), "plain"), ((53, 33, 5), "padded"), ((53, 64, 17), "transposed")],
)


@each_dtype
@each_shape
def test_projection(shape, layout, dtype):
    check_projection(shape, dtype, layout, device="cuda")


def test_special_rows():
    check_special_rows(torch.bfloat16, device="cuda")


@pytest.mark.parametrize("bias_grad", [False, True])
@each_dtype
@each_shape
def test_gradient(shape, layout, dtype, bias_grad):
    check_gradient(shape, dtype, layout, split=3, bias_grad=bias_grad, device="cuda")


@each_dtype
def test_the_whole_gradient(dtype):
    check_whole_gradient(30, dtype, split=2, device="cuda")
