"""Reads NVIDIA machine code with the disassemblers that Triton's wheel brings along."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton

from bench.microscope import dots
from bench.microscope.compiling import Compiled
from bench.microscope.counts import Counts, LoopCounts, tally
from bench.microscope.loops import Instruction, Loop, find_loops, hottest

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = re.compile(r"(HMMA|HGMMA|UTC[A-Z]*MMA|QGMMA|QMMA|OMMA|DMMA|IMMA|IGMMA)\b")
COPY = re.compile(r"(LDGSTS|LDG|UTMALDG|UBLKCP)\b")
OTHER = re.compile(r"(LDSM|LDS|STS|STSM|HMUL2|HFMA2|HADD2|FMUL|FFMA|LDL|STL|SYNCS|BAR|LDTM|STTM)\b")
LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?(.*?)\s*;")
LABEL = re.compile(r"^(\.L_\w+):")
TARGET = re.compile(r"`\((\.L_\w+)\)")


def read(compiled: Compiled) -> Counts:
    """Count what is in a compiled kernel's cubin."""
    cubin = compiled.asm["cubin"]
    usage = _run("cuobjdump", "--dump-resource-usage", cubin)
    used = {key: int(n) for key, n in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    code, labels = parse(_run("nvdisasm", "-c", cubin))
    loop = hottest(find_loops(code, labels, drop_detours=True), _is_matrix, _is_copy)
    return Counts(
        registers=used["REG"],
        accumulators=0,
        scalars=0,
        spills=sum(bool(re.match(r"(STL|LDL)\b", i.mnemonic)) for i in code),
        scalar_spills=0,
        stack=used["STACK"],
        shared=compiled.shared,
        tensor_memory=compiled.tensor_memory,
        loop=_count(loop, compiled) if loop else None,
    )


def parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a disassembled kernel, and where its labels stand."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := LINE.match(line):
            code.append(_instruction(found[1], found[2]))
    return code, labels


def _instruction(guard: str | None, text: str) -> Instruction:
    mnemonic, _, operands = text.partition(" ")
    target = TARGET.search(text) if re.match(r"(BRA|JMP)\b", mnemonic) else None
    leaves = re.match(r"(BRA|JMP|EXIT|RET|BRX|JMX)\b", mnemonic) is not None
    plain = guard is None and (target is None or operands.strip() == target[0])
    return Instruction(text, mnemonic, target[1] if target else None, not (leaves and plain))


def _is_matrix(instruction: Instruction) -> bool:
    return MATRIX.match(instruction.mnemonic) is not None


def _is_copy(instruction: Instruction) -> bool:
    return COPY.match(instruction.mnemonic) is not None


def _count(loop: Loop, compiled: Compiled) -> LoopCounts:
    matrix = tally(i.mnemonic for i in loop.body if _is_matrix(i))
    return LoopCounts(
        instructions=len(loop.body),
        matrix=matrix,
        copies=tally(_copy(i.mnemonic) for i in loop.body),
        others=tally(m[1] for i in loop.body if (m := OTHER.match(i.mnemonic))),
        iterations=dots.iterations(compiled.asm["ttgir"], _depth, matrix),
    )


def _copy(mnemonic: str) -> str | None:
    kind = COPY.match(mnemonic)
    if kind is None or kind[1] in ("UTMALDG", "UBLKCP"):
        return kind and kind[1]
    parts = mnemonic.split(".")
    for part, bits in {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8}.items():
        if part in parts:
            return f"{kind[1]}.{bits}"
    return f"{kind[1]}.32"


def _depth(mnemonic: str, bits: int) -> int:
    """The K of one matrix instruction, whose operands have `bits` bits."""
    if shape := re.search(r"\d+x\d+x(\d+)", mnemonic):
        return int(shape[1])
    if shape := re.match(r"HMMA\.168(\d+)", mnemonic):
        return int(shape[1])
    return 256 // bits


def _run(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
