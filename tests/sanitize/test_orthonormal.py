"""The basis after a refresh, by kernels as compiled: values, bounds, races."""

import pytest
import torch

from tests.orthonormal_checks import check_kept, check_leading_columns, check_product

pytestmark = pytest.mark.parametrize("gpu", [80], indirect=True, ids=["sm_80"])


@pytest.mark.parametrize(
    ("name", "shape", "layout", "due"),
    [
        ("random", (1, 1), "plain", None),
        ("rank r/2", (10, 10), "padded", True),
        ("columns differ by 1e60", (150, 16), "transposed", [True]),
        ("condition 1e6", (65, 17), "strided", None),
        ("one row", (70, 33), "plain", [True]),
    ],
)
def test_products(name, shape, layout, due):
    check_product(name, shape, layout, due, device="cuda")


def test_shares_of_several_tiles():
    check_product("equal columns", (4200, 3), device="cuda")


@pytest.mark.parametrize(("value", "due"), [(0, True), (torch.nan, True), (None, False)])
def test_the_basis_is_kept(value, due):
    check_kept(value, due, device="cuda")


def test_leading_columns():
    check_leading_columns(device="cuda")
