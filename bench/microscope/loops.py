"""Loops of a disassembled kernel, found from its jumps backwards."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One instruction, its mnemonic with all suffixes.

    Attributes:
        text: The whole instruction.
        mnemonic: Its first word, without a guarding predicate.
        jump: The label that it may jump to, if it is a branch.
    """

    text: str
    mnemonic: str
    jump: str | None = None


def find_loops(code: list[Instruction], labels: dict[str, int]) -> list[range]:
    """The code of each loop: from where a jump leads back to, to the last jump that leads there.

    What begins inside a loop and ends behind it is no loop: ptxas puts the retries of a barrier
    that was not ready behind the loop, from where they jump back into it.

    Args:
        code: The instructions of one kernel.
        labels: The index of the instruction behind each label.
    """
    ends = {}
    for i, instruction in enumerate(code):
        start = labels.get(instruction.jump, len(code)) if instruction.jump else len(code)
        if start <= i:
            ends[start] = i + 1
    loops = [range(start, end) for start, end in ends.items()]
    return [a for a in loops if not any(b.start < a.start < b.stop < a.stop for b in loops)]


def hottest(
    code: list[Instruction],
    labels: dict[str, int],
    matrix: re.Pattern[str],
    load: re.Pattern[str],
) -> list[Instruction]:
    """The innermost loop with the most matrix instructions, or else the largest that loads.

    Innermost: it has no smaller loop inside that would do. The patterns are those of mnemonics.
    Empty if there is none.
    """

    def count(loop: range, kind: re.Pattern[str]) -> int:
        return sum(kind.match(code[i].mnemonic) is not None for i in loop)

    loops = find_loops(code, labels)
    for kind, size in ((matrix, matrix), (load, re.compile(""))):
        having = [loop for loop in loops if count(loop, kind)]
        innermost = [
            a
            for a in having
            if not any(a != b and a.start <= b.start and b.stop <= a.stop for b in having)
        ]
        if innermost:
            best = max(innermost, key=lambda loop: (count(loop, size), count(loop, load)))
            return code[best.start : best.stop]
    return []
