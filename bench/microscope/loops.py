"""Loops of a disassembled kernel, found from its control flow."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One instruction, its mnemonic with all suffixes.

    Attributes:
        text: The whole instruction.
        mnemonic: Its first word, without a guarding predicate.
        jump: The label it may go on at, if it is a branch.
        falls: Whether the next instruction may follow it.
    """

    text: str
    mnemonic: str
    jump: str | None = None
    falls: bool = True


@dataclass(frozen=True)
class Loop:
    """A natural loop.

    Attributes:
        blocks: Indices of its basic blocks, in the order of the code.
        body: Its instructions, in the order of the code.
    """

    blocks: frozenset[int]
    body: tuple[Instruction, ...]

    def count(self, kind: re.Pattern[str]) -> int:
        """Number of instructions whose mnemonic starts as the pattern says."""
        return sum(kind.match(instruction.mnemonic) is not None for instruction in self.body)


def find_loops(
    code: list[Instruction], labels: dict[str, int], *, drop_detours: bool = False
) -> list[Loop]:
    """Every natural loop; `labels` gives the index of the instruction behind a label.

    Args:
        code: The instructions of one kernel.
        labels: Where each label stands.
        drop_detours: Leave out what lies behind the loop's last branch. That is where ptxas puts
            the retries of a barrier that was not ready; they belong to the loop but run seldom.
    """
    starts = _block_starts(code, labels)
    blocks = [code[i:j] for i, j in zip(starts, [*starts[1:], len(code)], strict=True)]
    successors = _successors(blocks, starts, labels)
    predecessors: list[list[int]] = [[] for _ in blocks]
    for block, following in enumerate(successors):
        for other in following:
            predecessors[other].append(block)
    latches: dict[int, list[int]] = {}
    for block, dominators in _dominators(predecessors, successors).items():
        for header in dominators.intersection(successors[block]):
            latches.setdefault(header, []).append(block)
    return [
        _loop(header, ends, blocks, predecessors, drop_detours) for header, ends in latches.items()
    ]


def hottest(loops: list[Loop], matrix: re.Pattern[str], load: re.Pattern[str]) -> Loop | None:
    """The innermost loop with the most matrix instructions, or else the largest that loads.

    Innermost: it has no smaller loop inside that would do. The patterns are those of mnemonics.
    """
    for kind, size in ((matrix, matrix), (load, re.compile(""))):
        having = [loop for loop in loops if loop.count(kind)]
        innermost = [a for a in having if not any(b.blocks < a.blocks for b in having)]
        if innermost:
            return max(innermost, key=lambda loop: (loop.count(size), loop.count(load)))
    return None


def _block_starts(code: list[Instruction], labels: dict[str, int]) -> list[int]:
    starts = {0} | {at for at in labels.values() if at < len(code)}
    starts |= {
        i + 1
        for i, instruction in enumerate(code[:-1])
        if instruction.jump is not None or not instruction.falls
    }
    return sorted(starts)


def _successors(
    blocks: list[list[Instruction]], starts: list[int], labels: dict[str, int]
) -> list[list[int]]:
    block_at = {start: block for block, start in enumerate(starts)}
    result = []
    for block, content in enumerate(blocks):
        last = content[-1]
        following = [block + 1] if last.falls and block + 1 < len(blocks) else []
        target = block_at.get(labels.get(last.jump, -1)) if last.jump is not None else None
        if target is not None:
            following.append(target)
        result.append(following)
    return result


def _dominators(
    predecessors: list[list[int]], successors: list[list[int]]
) -> dict[int, frozenset[int]]:
    """What every path from the entry passes before each block that can be reached."""
    order, seen = [0], {0}
    for block in order:
        for other in successors[block]:
            if other not in seen:
                seen.add(other)
                order.append(other)
    dominators = dict.fromkeys(order, frozenset(order))
    dominators[0] = frozenset({0})
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            before = [dominators[p] for p in predecessors[block] if p in dominators]
            new = functools.reduce(frozenset.intersection, before) | {block}
            changed |= new != dominators[block]
            dominators[block] = new
    return dominators


def _loop(
    header: int,
    latches: list[int],
    blocks: list[list[Instruction]],
    predecessors: list[list[int]],
    drop_detours: bool,
) -> Loop:
    inside = {header}
    open_blocks = list(latches)
    while open_blocks:
        block = open_blocks.pop()
        if block not in inside:
            inside.add(block)
            open_blocks += predecessors[block]
    if drop_detours:
        tested = [block for block in latches if blocks[block][-1].falls]
        end = max(tested or latches)
        inside = {block for block in inside if block <= end}
    body = tuple(i for block in sorted(inside) for i in blocks[block])
    return Loop(frozenset(inside), body)
