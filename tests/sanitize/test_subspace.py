"""The subspace memory's products as compiled: values in every dtype, bounds, races, tf32."""

import pytest
import torch

from bench.microscope.cases import float32_products
from memaop_triton.kernels.gpu import subspace
from tests.kernel_checks import (
    TILE,
    check_gradient,
    check_projection,
    check_special_rows,
    check_whole_gradient,
    new_basis,
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


def test_tf32_when_torch_allows_it():
    x, (q, _) = torch.randn(20, 40, device="cuda"), new_basis(40, 5, torch.float32, "cuda")
    exact, errors = x.double() @ q.double(), {}
    for allowed in ("ieee", "tf32"):
        with float32_products(allowed):
            z, _ = subspace.project(x, q, 1.0, config=TILE)
        errors[allowed] = (z - exact).abs().max().item()
    assert errors["ieee"] < 1e-6
    assert 1e-5 < errors["tf32"] < 1e-2
