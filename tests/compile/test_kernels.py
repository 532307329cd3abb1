"""What the compiler makes of every kernel in every shipped configuration, on every target."""

import pytest
import torch
import triton

from bench.microscope.building import REPORTED, by_name
from bench.microscope.compiling import compile_call
from bench.microscope.gathering import pairs
from bench.microscope.reading import read
from bench.microscope.report import faults
from bench.microscope.shipped import cases, row_tiles
from memaop_triton.kernels import configs
from memaop_triton.kernels.targets import TARGETS

HALF = (torch.bfloat16, torch.float16)
NVIDIA = [target for target in REPORTED if TARGETS[target].backend == "cuda"]
UNITS = {"sm_90": "HGMMA", "sm_100": "UTC"}


def keys(wanted, targets=REPORTED):
    """Parametrises a test with the keys of the cases that are wanted."""
    found = [
        (target, case.name) for target in targets for case in cases(TARGETS[target]) if wanted(case)
    ]
    return pytest.mark.parametrize("key", found, ids="-".join)


def case_of(key):
    target, name = key
    return by_name(target)[name]


def is_half_product(case):
    return case.dtype in HALF and case.product_rows > 0


everything = [
    (target, name)
    for target in REPORTED
    for name in by_name(target)
    if not name.startswith("plain")
]


@pytest.mark.parametrize("key", everything, ids="-".join)
def test_values_stay_in_registers_and_tiles_fit(key, built):
    assert [fault for one in built for fault in faults(*key, one)] == []


@keys(lambda case: is_half_product(case) and case.product_rows >= 64, UNITS)
def test_products_of_large_tiles_take_the_newest_instructions(key, built):
    matrix = built[0].counts.matrix
    assert matrix
    assert all(name.startswith(UNITS[key[0]]) for name in matrix)


@keys(lambda case: is_half_product(case) and case.product_rows < 64, UNITS)
def test_products_of_few_rows_take_the_instructions_of_a_warp(built):
    assert built[0].counts.matrix
    assert all(name.startswith("HMMA") for name in built[0].counts.matrix)


@keys(
    lambda case: case.product_rows > 0,
    [target for target in REPORTED if target not in UNITS],
)
def test_products_elsewhere_take_matrix_instructions(key, built):
    target, case = TARGETS[key[0]], case_of(key)
    exact = case.dtype == torch.float32 and case.precision == "ieee"
    assert bool(built[0].counts.matrix) != (exact and target.backend == "cuda")


@keys(lambda case: case.dtype == torch.float32 and case.precision == "ieee", NVIDIA)
def test_exact_products_take_no_matrix_instruction(built):
    assert all(not one.counts.matrix for one in built)
