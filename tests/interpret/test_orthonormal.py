"""The basis after a refresh, against Gram–Schmidt in float64, and what a refresh launches."""

import pytest
import torch

from tests.orthonormal_checks import (
    PRODUCTS,
    SHAPES,
    basis,
    check_kept,
    check_leading_columns,
    check_product,
)
from tests.judging import LAYOUTS
from tests.pairwise import pairwise


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name, shape):
    check_product(name, shape)
