"""Reads AMD machine code from the assembly that Triton keeps."""

from __future__ import annotations

import re
from collections import Counter

from bench.microscope import dots
from bench.microscope.compiling import Compiled
from bench.microscope.counts import Counts, LoopCounts, tally
from bench.microscope.loops import Instruction, Loop, find_loops, hottest

MATRIX = re.compile(r"v_s?mfma|v_wmma")
COPY = re.compile(
    r"(?:buffer|global|flat)_load_(?:lds_)?(dwordx[234]|dword|[us]?short|[us]?byte|b\d+)"
)
OTHER = re.compile(r"(ds_read|ds_write|s_waitcnt|s_barrier|v_perm|v_pk_mul|scratch_)")
LABEL = re.compile(r"^(\.LBB\w+):")
BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}


def read(compiled: Compiled) -> Counts:
    """Count what is in a compiled kernel's assembly."""
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"^\s+(?:- )?\.{name}:\s+(\d+)", text, re.MULTILINE)
        return int(found[1]) if found else 0

    code, labels = parse(text)
    loop = hottest(find_loops(code, labels), MATRIX, COPY)
    return Counts(
        registers=field("vgpr_count"),
        accumulators=field("agpr_count"),
        scalars=field("sgpr_count"),
        spills=field("vgpr_spill_count"),
        scalar_spills=field("sgpr_spill_count"),
        stack=field("private_segment_fixed_size"),
        shared=compiled.shared,
        tensor_memory=0,
        matrix=tally(i.mnemonic for i in code if MATRIX.match(i.mnemonic)),
        loop=_count(loop, compiled) if loop else None,
    )


def parse(assembly: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of an assembly listing, and where its labels stand."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        text = line.split(";")[0].strip()
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif line.startswith("\t") and re.match(r"[sv]_|ds_|buffer_|global_|flat_|scratch_", text):
            code.append(_instruction(text))
    return code, labels


def _instruction(text: str) -> Instruction:
    mnemonic, _, operands = text.partition(" ")
    jump = operands.strip() if mnemonic.startswith(("s_branch", "s_cbranch")) else None
    falls = mnemonic not in ("s_branch", "s_endpgm", "s_setpc_b64")
    return Instruction(text, mnemonic, jump, falls)


def _count(loop: Loop, compiled: Compiled) -> LoopCounts:
    matrix = tally(i.mnemonic for i in loop.body if MATRIX.match(i.mnemonic))
    return LoopCounts(
        instructions=len(loop.body),
        matrix=matrix,
        copies=tally(_copy(i) for i in loop.body),
        streams=_streams(loop),
        others=tally(i.mnemonic for i in loop.body if OTHER.match(i.mnemonic)),
        iterations=dots.iterations(compiled.asm["ttgir"], _depth, matrix),
    )


def _streams(loop: Loop) -> tuple[Counter[str], ...]:
    """The copies of each buffer, which four scalar registers describe."""
    found: dict[str, Counter[str]] = {}
    for instruction in loop.body:
        if name := _copy(instruction):
            buffer = re.search(r"\bs\[\d+:\d+\]", instruction.text)
            found.setdefault(buffer[0] if buffer else "", Counter())[name] += 1
    return tuple(found.values())


def _copy(instruction: Instruction) -> str | None:
    """The copy's kind and width; "lds" if it goes to shared memory without passing registers."""
    width = COPY.match(instruction.mnemonic)
    if width is None:
        return None
    bits = BITS.get(re.sub(r"^[us](?=short|byte)", "", width[1])) or int(width[1].lstrip("b"))
    direct = "lds" in re.split(r"[\s_]", instruction.text)
    kind = instruction.mnemonic.split("_")[0]
    return f"{kind}_load{'_lds' if direct else ''}.{bits}"


def _depth(mnemonic: str, bits: int) -> int:
    """The K of one matrix instruction."""
    shape = re.search(r"\d+x\d+x(\d+)", mnemonic)
    return int(shape[1]) if shape else 128 // bits
