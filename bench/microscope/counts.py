"""What is read off a compiled kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class LoopCounts:
    """The inner loop, counted.

    Attributes:
        instructions: All of them; a predicated one takes its issue slot as well.
        matrix: Matrix instructions by mnemonic.
        copies: Copies out of global memory by mnemonic and bits per thread: "LDGSTS.128". Copies by
            descriptor (TMA) have no width: "UTMALDG".
        streams: The copies apart by what they read, as far as the instructions tell: by buffer
            (AMD), by mnemonic and bits (NVIDIA).
    """

    instructions: int
    matrix: Counter[str]
    copies: Counter[str]
    streams: tuple[Counter[str], ...]

    @property
    def wide_copies(self) -> int:
        """Copies of 16 bytes or more, or of whole tiles."""
        return sum(n for name, n in self.copies.items() if copy_bits(name) >= 128)

    @property
    def wide_streams(self) -> list[int]:
        """Bytes per thread of each stream whose copies are all of 16 bytes or more."""
        bits = [[copy_bits(name) for name in stream.elements()] for stream in self.streams]
        return [sum(widths) // 8 for widths in bits if min(widths) >= 128]


@dataclass(frozen=True)
class Counts:
    """A kernel, counted.

    Attributes:
        registers: Vector registers per thread, AMD's accumulation registers included.
        spills: Instructions (NVIDIA) or vector registers (AMD) that spill.
        stack: Bytes of local memory (scratch) per thread.
        shared: Bytes of shared memory per program.
        matrix: Matrix instructions of the whole kernel by mnemonic.
        loop: The inner loop, if there is any.
        accumulators: AMD's accumulation registers alone.
        scalar_spills: AMD's scalar registers that are kept in lanes of vector registers.
    """

    registers: int
    spills: int
    stack: int
    shared: int
    matrix: Counter[str]
    loop: LoopCounts | None
    accumulators: int = 0
    scalar_spills: int = 0


def tally(names: Iterable[str | None]) -> Counter[str]:
    """Counts of names in alphabetical order, `None` left out."""
    return Counter(dict(sorted(Counter(n for n in names if n is not None).items())))


def copy_bits(name: str) -> int:
    """Bits that one thread's copy moves; a whole row of bytes counts for copies without a width."""
    width = name.rpartition(".")[2]
    return int(width) if width.isdigit() else 1 << 10
