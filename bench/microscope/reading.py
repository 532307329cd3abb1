"""Counts of a compiled kernel, whatever it was compiled for."""

from __future__ import annotations

from bench.microscope import amd, nvidia
from bench.microscope.compiling import Compiled
from bench.microscope.counts import Counts


def read(compiled: Compiled) -> Counts:
    """Count what the compiler emitted."""
    return nvidia.read(compiled) if compiled.target.backend == "cuda" else amd.read(compiled)
