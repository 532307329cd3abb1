"""The plain GEMM that the benchmarks compare the gathering one with."""

import pytest
import torch

from memaop_triton.bench.suites.plain_gemm import pointer_gemm
from tests.judging import check_products, operands


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(32, 16, 32), (37, 17, 33)])
def test_product(shape, weighted, dtype):
    rows, n, p = shape
    x, g = operands(rows, n, p, dtype)
    weights = torch.rand(rows) if weighted else None
    result = pointer_gemm(g, x, weights, tile=(16, 16, 16))
    check_products(result, x, g, torch.arange(rows), weights)
