"""Packing has no loop, so `test_kernels` sees nothing of its copies: all of them are wide."""

import re

import pytest
import torch

from bench.microscope.building import REPORTED
from bench.microscope.cases import memory, operands, scalars
from bench.microscope.compiling import compile_call
from memaop_triton.kernels.gpu.pack import COLUMNS, ROWS, pack_rows
from memaop_triton.kernels.targets import TARGETS

CODE = {"cuda": "ptx", "hip": "amdgcn"}
ACCESS = {
    "cuda": re.compile(r"\b(ld|st)\.global\S*?\.(v4\.b32|v2\.b64|v8\.b32|b\d+|v\d\.b\d+)\b"),
    "hip": re.compile(r"\b(?:buffer|global)_(load|store)_(\w+)"),
}
WIDE = {"v4.b32": 16, "v2.b64": 16, "v8.b32": 32, "dwordx4": 16}


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target", REPORTED)
def test_tiles_are_read_and_written_16_bytes_at_a_time(target, stored):
    """In one piece of code for each matrix, or in one for both, as AMD's compiler may have it."""
    backend, half = TARGETS[target].backend, torch.bfloat16
    (compiled,) = compile_call(
        lambda: pack_rows(memory(stored), **operands(half), **scalars(), signed=True),
        TARGETS[target],
    )
    found = ACCESS[backend].findall(compiled.asm[CODE[backend]])
    loads, stores = ([width for way, width in found if way[0] == first] for first in "ls")
    assert all(width in WIDE for width in stores)
    for widths, bytes_each in ((loads, 2 + stored.itemsize), (stores, 2)):
        moved = compiled.threads * sum(WIDE.get(width, 0) for width in widths)
        assert moved in (ROWS * COLUMNS * bytes_each, 2 * ROWS * COLUMNS * bytes_each)
