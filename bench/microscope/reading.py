"""Counts of compiled kernels, whatever they were compiled for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import ModuleType

from bench.microscope import amd, nvidia
from bench.microscope.compiling import Compiled
from bench.microscope.counts import Counts, LoopCounts, tally
from bench.microscope.loops import Instruction, hottest


def read(compiled: Compiled) -> Counts:
    """Count what the compiler emitted."""
    return read_all([compiled])[0]


def read_all(compiled: Sequence[Compiled]) -> list[Counts]:
    """The same for several kernels that were compiled for one target."""
    vendor = nvidia if compiled[0].target.backend == "cuda" else amd
    counts = []
    for one, (code, labels) in zip(compiled, vendor.listings(compiled), strict=True):
        loop = hottest(code, labels, vendor.MATRIX, vendor.COPY)
        counts.append(
            Counts(
                **vendor.resources(one, code),
                shared=one.shared,
                matrix=tally(i.mnemonic for i in code if vendor.MATRIX.match(i.mnemonic)),
                loop=_count(loop, vendor) if loop else None,
            )
        )
    return counts


def _count(loop: list[Instruction], vendor: ModuleType) -> LoopCounts:
    streams: dict[str, Counter[str]] = {}
    for instruction in loop:
        if name := vendor.copy_of(instruction):
            streams.setdefault(vendor.stream_of(instruction), Counter())[name] += 1
    return LoopCounts(
        instructions=len(loop),
        matrix=tally(i.mnemonic for i in loop if vendor.MATRIX.match(i.mnemonic)),
        copies=tally(map(vendor.copy_of, loop)),
        streams=tuple(streams.values()),
    )
