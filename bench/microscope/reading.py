"""Counts of compiled kernels, whatever they were compiled for."""

from __future__ import annotations

from collections.abc import Sequence

from bench.microscope import amd, nvidia
from bench.microscope.compiling import Compiled
from bench.microscope.counts import Counts


def read(compiled: Compiled) -> Counts:
    """Count what the compiler emitted."""
    return read_all([compiled])[0]


def read_all(compiled: Sequence[Compiled]) -> list[Counts]:
    """The same for several kernels that were compiled for one target."""
    if not compiled:
        return []
    if compiled[0].target.backend == "cuda":
        return nvidia.read_all(compiled)
    return [amd.read(one) for one in compiled]
