"""What the compiler makes of every kernel in every shipped configuration, on every target."""

import dataclasses
import itertools

import pytest
import torch
import triton

from bench.microscope.building import REPORTED, by_name
from bench.microscope.compiling import compile_call
from bench.microscope.counts import copy_bits
from bench.microscope.gathering import pairs
from bench.microscope.kernel_report import PAGE, page, version_of_page
from bench.microscope.kernel_report import keys as reported
from bench.microscope.reading import read
from bench.microscope.report import faults
from bench.microscope.shipped import cases, row_tiles
from memaop_triton.kernels.targets import TARGETS
from memaop_triton.kernels.tuning import defaults

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
    """With other versions than the report's, whose assemblers differ, four values may spill."""
    spare = 0 if triton.__version__ == version_of_page() else 32
    assert [fault for one in built for fault in faults(*key, one, spare=spare)] == []


def test_the_committed_report_is_what_would_be_written_now(builder):
    if version_of_page() != triton.__version__:
        pytest.skip(f"written with Triton {version_of_page()}, this is {triton.__version__}")
    builder.start(reported())
    assert page(builder) == PAGE.read_text(encoding="utf-8"), "run `make kernel-report`"


@pytest.mark.parametrize("target", sorted(set(TARGETS) - set(REPORTED)))
def test_gather_gemms_fit_the_targets_without_a_table(target):
    wanted = [
        case
        for case in cases(TARGETS[target])
        if case.dtype == torch.bfloat16 and case.title == "gather rows, weighted + C"
    ]
    assert wanted
    for case in wanted:
        for kernel in compile_call(case.call, TARGETS[target]):
            counts = read(kernel)
            assert (counts.spills, counts.stack) == (0, 0), case.name
            assert counts.shared <= TARGETS[target].shared_memory, case.name


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


@keys(lambda case: case.dtype in HALF and case.step_bytes > 0 and not case.by_descriptor)
def test_half_precision_operands_are_copied_16_bytes_at_a_time(key, built):
    """Some of the loop's streams, all of whose copies are wide, move just the operands' bytes.

    What else is copied, row numbers, weights and flags, is narrower or stands in other streams.
    """
    case, loop = case_of(key), built[0].counts.loop
    moved = [width * built[0].threads / loop.iterations for width in loop.wide_streams]
    sums = {sum(some) for n in range(len(moved)) for some in itertools.combinations(moved, n + 1)}
    assert sums & {case.step_bytes, case.step_bytes + case.side_bytes}


@keys(lambda case: case.by_descriptor)
def test_blocks_are_copied_as_whole_tiles(built):
    copies = built[0].counts.loop.copies
    assert copies["UTMALDG"] >= 2
    assert all(copy_bits(name) < 128 for name in copies if name != "UTMALDG")


@pytest.mark.parametrize(
    ("way", "weighted", "limit"),
    [
        ("rows", False, 1.27),
        ("blocks of rows", False, 1.15),
        # Beside plain GEMMs that multiply by weights as well.
        ("rows", True, 1.45),
        ("blocks of rows", True, 1.35),
    ],
)
def test_gathering_adds_few_instructions(builder, way, weighted, limit):
    ratios = {}
    for pair in pairs(TARGETS["sm_90"]):
        if (pair.way, pair.weighted) == (way, weighted):
            loop, plain = pair.loops(builder, "sm_90")
            ratios[pair.gathering] = loop / plain
    assert ratios
    assert {name: ratio for name, ratio in ratios.items() if ratio > limit} == {}


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("rows", [1, 999, 12345, 1 << 20])
@pytest.mark.parametrize("target", REPORTED)
def test_every_tile_for_rows_is_among_the_cases(target, rows, sums):
    tile = defaults.for_rows(TARGETS[target], rows, sums)
    assert (tile, sums) in row_tiles()


@pytest.mark.skipif(not triton.__version__.startswith("3.7."), reason="a fault of Triton 3.7")
def test_wider_exact_tiles_of_computed_operands_would_be_rounded_to_tf32():
    """Why `defaults.py` keeps these tiles narrow; if this fails, they can be wider."""
    (tile, *_) = defaults.residual_tiles(TARGETS["sm_100"], torch.float32, "ieee")
    wide = dataclasses.replace(tile, block_n=64, block_p=64)
    (case, *_) = (c for c in cases(TARGETS["sm_100"]) if c.config == tile and "resid" in c.title)
    (kernel,) = compile_call(lambda: case.call(config=wide), TARGETS["sm_100"])
    assert read(kernel).matrix
