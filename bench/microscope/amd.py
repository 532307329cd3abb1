"""Reads AMD machine code from the assembly that Triton keeps."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bench.microscope.compiling import Compiled
from bench.microscope.loops import Instruction

MATRIX = re.compile(r"v_s?mfma|v_wmma")
COPY = re.compile(
    r"(?:buffer|global|flat)_load_(?:lds_)?(dwordx[234]|dword|[us]?short|[us]?byte|b\d+)"
)
LABEL = re.compile(r"^(\.LBB\w+):")
BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}


def listings(compiled: Sequence[Compiled]) -> list[tuple[list[Instruction], dict[str, int]]]:
    """The instructions and labels of compiled kernels."""
    return [parse(one.asm["amdgcn"]) for one in compiled]


def resources(compiled: Compiled, code: list[Instruction]) -> dict[str, int]:
    """Registers, spills and scratch, from the assembly's metadata."""
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"^\s+(?:- )?\.{name}:\s+(\d+)", text, re.MULTILINE)
        return int(found[1]) if found else 0

    return {
        "registers": field("vgpr_count"),
        "accumulators": field("agpr_count"),
        "spills": field("vgpr_spill_count"),
        "scalar_spills": field("sgpr_spill_count"),
        "stack": field("private_segment_fixed_size"),
    }


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
    return Instruction(text, mnemonic, jump)


def copy_of(instruction: Instruction) -> str | None:
    """The copy's kind and width; "lds" if it goes to shared memory without passing registers."""
    width = COPY.match(instruction.mnemonic)
    if width is None:
        return None
    bits = BITS.get(re.sub(r"^[us](?=short|byte)", "", width[1])) or int(width[1].lstrip("b"))
    direct = "lds" in re.split(r"[\s_]", instruction.text)
    kind = instruction.mnemonic.split("_")[0]
    return f"{kind}_load{'_lds' if direct else ''}.{bits}"


def stream_of(instruction: Instruction) -> str:
    """What distinguishes copies of one matrix from those of another: four registers."""
    buffer = re.search(r"\bs\[\d+:\d+\]", instruction.text)
    return buffer[0] if buffer else ""
