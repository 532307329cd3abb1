"""The subspace memory's products, against their formulas in float64."""

import pytest
import torch

from bench.microscope.cases import float32_products
from memaop_triton.kernels.gpu import launch, subspace
from memaop_triton.kernels.tuning.config import RowConfig
from tests.judging import LAYOUTS, as_good_as, operands
from tests.kernel_checks import (
    TILE,
    check_gradient,
    check_projection,
    check_special_rows,
    check_whole_gradient,
)
from tests.pairwise import pairwise

DTYPES = (torch.float16, torch.float32)
# M, N, q
SHAPES = [(1, 1, 1), (17, 3, 2), (3, 129, 16), (129, 33, 17), (40, 64, 5), (20, 80, 64)]


@pytest.mark.parametrize(
    ("shape", "dtype", "config", "layout"),
    pairwise(SHAPES, DTYPES, [TILE, RowConfig(16, 16, 4), None], LAYOUTS),
)
def test_projection(shape, dtype, config, layout):
    check_projection(shape, dtype, layout, config=config)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_rows(dtype):
    check_special_rows(dtype)


@pytest.mark.parametrize(
    ("dtype", "allowed", "formed", "epsilon"),
    [
        (torch.float32, "ieee", "ieee", 2**-23),
        (torch.float32, "tf32", "tf32", 2**-10),
        (torch.float16, "tf32", "ieee", 2**-10),
        (torch.bfloat16, "tf32", "ieee", 2**-7),
    ],
)
def test_the_rest_drowns_in_the_rounding_of_its_product(
    dtype, allowed, formed, epsilon, tensor_copies, monkeypatch
):
    """The least rest that is stored is that of the precision that Z is computed in."""
    given = []
    monkeypatch.setattr(launch, "launch", lambda *args, **kwargs: given.append(kwargs))
    with float32_products(allowed):
        subspace.project(torch.ones(8, 32, dtype=dtype), torch.ones(32, 4, dtype=dtype), 4.0)
    (launched,) = given
    assert (launched["PRECISION"], launched["epsilon"]) == (formed, epsilon)


@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "split", "bias_grad"),
    pairwise(SHAPES, DTYPES, LAYOUTS, [1, 2, 3], [False, True]),
)
def test_gradient(shape, dtype, layout, split, bias_grad):
    check_gradient(shape, dtype, layout, split=split, bias_grad=bias_grad)


def test_the_chosen_tile_of_a_transposed_product():
    a, z = operands(129, 33, 17, torch.float32)
    as_good_as(subspace.transposed_mm(z, a), a.T @ z, a.T.double() @ z.double())


@pytest.mark.parametrize("count", [80, 30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_gradient(dtype, count):
    check_whole_gradient(count, dtype)
