"""What the compiler makes of every kernel in every shipped configuration, on every target."""

import functools
import itertools

import pytest
import torch
import triton

from bench.microscope.awkward import far
from bench.microscope.building import REPORTED, by_name
from bench.microscope.compiling import compile_call
from bench.microscope.counts import copy_bits
from bench.microscope.gathering import pairs
from bench.microscope.kernel_report import PAGE, page, version_of_page
from bench.microscope.kernel_report import keys as reported
from bench.microscope.reading import read
from bench.microscope.report import faults
from bench.microscope.shipped import cases, row_tiles
from memaop_triton.kernels.gpu.gather_gemm import gather_gemm
from memaop_triton.kernels.targets import TARGETS
from memaop_triton.kernels.tuning import defaults
from tests.judging import figures

HALF = (torch.bfloat16, torch.float16)
UNITS = {"sm_90": "HGMMA", "sm_100": "UTC"}
# From 3.9 on the weighted gathering loops are longer: by up to 63 instructions, where 3.6 and 3.7
# add up to 57 and 49, beside plain loops that differ by ten at most.
NEWER = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


def keys(wanted):
    """Parametrises a test with the keys of the cases that are wanted."""
    found = [
        (target, case.name)
        for target in REPORTED
        for case in cases(TARGETS[target])
        if wanted(case)
    ]
    return pytest.mark.parametrize("key", found, ids="-".join)


def case_of(key):
    target, name = key
    return by_name(target)[name]


def is_usual(case):
    return case.dtype == torch.bfloat16 and case.title == "gather rows, weighted + C"


everything = [
    (target, name)
    for target in TARGETS
    for name, case in by_name(target).items()
    if not name.startswith("plain") and (target in REPORTED or is_usual(case))
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
    committed = PAGE.read_text(encoding="utf-8")
    assert figures(page(builder)) == figures(committed), "run `make kernel-report`"


@keys(lambda case: case.product_rows > 0)
def test_products_take_the_newest_instructions_unless_they_are_exact(key, built):
    target, case = TARGETS[key[0]], case_of(key)
    names = list(built[0].counts.matrix)
    if case.dtype == torch.float32 and case.precision == "ieee" and target.backend == "cuda":
        assert not any(one.counts.matrix for one in built)
        return
    assert names
    if case.dtype in HALF and target.name in UNITS:
        unit = UNITS[target.name] if case.product_rows >= 64 else "HMMA"
        assert all(name.startswith(unit) for name in names)


@keys(lambda case: case.dtype in HALF and case.step_bytes > 0 and not case.by_descriptor)
def test_half_precision_operands_are_copied_16_bytes_at_a_time(key, built):
    """Some of the loop's streams, all of whose copies are wide, move just the operands' bytes.

    What else is copied, row numbers, weights and flags, is narrower or stands in other streams.
    """
    case, loop = case_of(key), built[0].counts.loop
    moved = [width * built[0].threads for width in loop.wide_streams]
    sums = {sum(some) for n in range(len(moved)) for some in itertools.combinations(moved, n + 1)}
    # From 3.9 on short loops of gfx950 take two steps at once.
    steps = (1, 2) if NEWER and key[0] == "gfx950" else (1,)
    assert sums & {
        s * b for s in steps for b in (case.step_bytes, case.step_bytes + case.side_bytes)
    }


def test_columns_of_unit_stride_beside_far_rows_compile():
    """A stride of 1 is a constant to the compiler, whatever the other operand's is."""
    x = torch.empty_strided((1 << 20, 4096), (1, 1 << 20), dtype=torch.bfloat16, device="meta")
    (tile, *_) = defaults.gemm_tiles(TARGETS["sm_90"], torch.bfloat16, "ieee", aligned=False)
    call = functools.partial(gather_gemm, **far() | {"x": x}, config=tile)
    (kernel,) = compile_call(call, TARGETS["sm_90"])
    assert read(kernel).spills == 0


@keys(lambda case: case.by_descriptor)
def test_blocks_are_copied_as_whole_tiles(built):
    copies = built[0].counts.loop.copies
    assert copies["UTMALDG"] >= 2
    assert all(copy_bits(name) < 128 for name in copies if name != "UTMALDG")


@pytest.mark.parametrize(
    ("way", "weighted", "limit"),
    [
        ("rows", False, 26),
        ("blocks of rows", False, 8),
        # Beside plain GEMMs that multiply by weights as well.
        ("rows", True, 64 if NEWER else 58),
        ("blocks of rows", True, 44),
    ],
)
def test_gathering_adds_few_instructions(builder, way, weighted, limit):
    """Not in proportion: Triton 3.6 writes the plain loop in 6 or 7 instructions fewer than 3.7."""
    added = {
        pair.gathering: builder.loop(("sm_90", pair.gathering))
        - builder.loop(("sm_90", pair.plain.name))
        for pair in pairs(TARGETS["sm_90"])
        if (pair.way, pair.weighted) == (way, weighted)
    }
    assert added
    assert {name: count for name, count in added.items() if count > limit} == {}


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("rows", [1, 999, 12345, 1 << 20])
@pytest.mark.parametrize("target", REPORTED)
def test_every_tile_for_rows_is_among_the_cases(target, rows, sums):
    tile = defaults.for_rows(TARGETS[target], rows, sums)
    assert (tile, sums) in row_tiles()
