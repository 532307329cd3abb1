"""How rows that are rounded and numbers that are restored come from memory, where N allows it."""

import pytest
import torch

from bench.microscope.building import by_name
from bench.microscope.compiling import compile_call
from bench.microscope.counts import copy_bits
from bench.microscope.predict import ROUNDING
from bench.microscope.reading import read
from memaop_triton.kernels.gpu import stash
from memaop_triton.kernels.targets import TARGETS


def loop_of(target, title):
    (name,) = [name for name in by_name(target) if name.startswith(title) and name.endswith("bf16")]
    (compiled,) = compile_call(by_name(target)[name].call, TARGETS[target])
    return read(compiled).loop, compiled.threads


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_rows_are_read_16_bytes_at_a_time_and_once(target):
    loop, threads = loop_of(target, "round to 4 bits, rank 0, 32x")
    assert all(copy_bits(name) == 128 for name in loop.copies)
    tile = stash.ROWS * stash.WIDEST * torch.bfloat16.itemsize
    assert 16 * threads * sum(loop.copies.values()) == tile


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_product_with_signs_takes_the_matrix_units_and_half_of_what_64_columns_would(target):
    """Per block: 32 columns by 32 for each half, of 16 x 8 x 16 in an instruction."""
    loop, threads = loop_of(target, "round to 4 bits, rank 0, 32x")
    (count,) = loop.matrix.values()
    warps = threads // 32
    assert count * warps * 16 * 8 * 16 == stash.ROWS * 2 * 32 * 32


@pytest.mark.parametrize("target", list(ROUNDING))
def test_predictions_count_what_is_compiled(target):
    titles = "round to 4 bits, rank 0, 32x", "round to 4 bits, rank 16, 32x"
    titles = *titles, "restore from 4 bits, rank 0, 64x"
    counted = [loop_of(target, title)[0].instructions for title in titles]
    # Triton's versions differ a little.
    assert counted == pytest.approx(ROUNDING[target], rel=0.1)
