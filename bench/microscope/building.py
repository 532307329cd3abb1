"""Compiles and reads many cases, on all processors."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass

from bench.microscope.awkward import awkward_cases
from bench.microscope.cases import Case, float32_products
from bench.microscope.compiling import Compiled, compile_call
from bench.microscope.counts import Counts
from bench.microscope.gathering import pairs
from bench.microscope.reading import read_all
from bench.microscope.shipped import cases
from memaop_triton.kernels.targets import TARGETS

# DESIGN 9.
REPORTED = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
AT_ONCE = 16  # cases whose machine code is disassembled together

Key = tuple[str, str]  # names of a target and of a case


@dataclass(frozen=True)
class Built:
    """One kernel of a case: its own name, how it was launched, and what was counted in it."""

    kernel: str
    num_warps: int
    num_stages: int
    threads: int
    counts: Counts


@functools.cache
def by_name(target: str) -> dict[str, Case]:
    """Everything that is compiled for a target: cases, awkward ones, and plain GEMMs."""
    every = TARGETS[target]
    found = [*cases(every), *awkward_cases(every), *(pair.plain for pair in pairs(every))]
    return {case.name: case for case in found}


def build(target: str, names: Iterable[str]) -> dict[str, list[Built]]:
    """Compile and read some of a target's cases."""
    compiled = {}
    for name in names:
        case = by_name(target)[name]
        with float32_products(case.precision):
            compiled[name] = compile_call(case.call, TARGETS[target])

    counts = iter(read_all(list(itertools.chain(*compiled.values()))))
    return {name: [_built(one, next(counts)) for one in ones] for name, ones in compiled.items()}


def _built(compiled: Compiled, counts: Counts) -> Built:
    launch = compiled.launch
    return Built(launch.name, launch.num_warps, launch.num_stages, compiled.threads, counts)


class Builder:
    """Builds cases in other processes, each once."""

    def __init__(self) -> None:
        # Not by fork: PyTorch's threads do not survive it.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(os.cpu_count(), context)
        self._futures: dict[Key, Future[dict[str, list[Built]]]] = {}

    def __enter__(self) -> Builder:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self, keys: Iterable[Key]) -> list[Future[dict[str, list[Built]]]]:
        """Begin to build; what was begun before is not begun again."""
        new = dict.fromkeys(key for key in keys if key not in self._futures)
        begun = []
        for target, group in itertools.groupby(new, lambda key: key[0]):
            names = [name for _, name in group]
            for i in range(0, len(names), AT_ONCE):
                begun.append(self._pool.submit(build, target, names[i : i + AT_ONCE]))
                self._futures |= {(target, n): begun[-1] for n in names[i : i + AT_ONCE]}
        return begun

    def __getitem__(self, key: Key) -> list[Built]:
        """The kernels of a case, once they are there."""
        self.start([key])
        return self._futures[key].result()[key[1]]

    def loop(self, key: Key) -> int:
        """Instructions in the inner loop of a case's own kernel."""
        counted = self[key][0].counts.loop
        assert counted, f"{key}: no loop was found"
        return counted.instructions
