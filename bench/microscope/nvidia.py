"""Reads NVIDIA machine code with the disassemblers in Triton's wheel."""

from __future__ import annotations

import bisect
import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import triton

from bench.microscope.compiling import Compiled
from bench.microscope.loops import Instruction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = re.compile(r"(HMMA|HGMMA|UTC[A-Z]*MMA|QGMMA|QMMA|OMMA|DMMA|IMMA|IGMMA)\b")
COPY = re.compile(r"(LDGSTS|LDG|UTMALDG|UBLKCP)\b")
# nvdisasm 12.8, that of Triton 3.6, writes when an instruction waits behind it: "&req={0} ?trans6".
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?)(?:\s+[&?].*)?\s*;")
TARGET = re.compile(r"\b0x[0-9a-f]+$")


def listings(compiled: Sequence[Compiled]) -> list[tuple[list[Instruction], dict[str, int]]]:
    """The instructions and labels of kernels that were compiled for one target.

    Together, because the disassembler takes a third of a second to start.
    """
    codes = [machine_code(one.asm["cubin"]) for one in compiled]
    arch = int(compiled[0].target.arch)
    version = f"SM{arch}a" if arch >= 90 else f"SM{arch}"
    sass = _run(b"".join(codes), "nvdisasm", "-ndf", "--binary", version)
    return parse(sass, [len(code) for code in codes])


def resources(compiled: Compiled, code: list[Instruction]) -> dict[str, int]:
    """Registers, stack, and instructions that spill."""
    usage = _run(compiled.asm["cubin"], "cuobjdump", "--dump-resource-usage")
    used = {key: int(n) for key, n in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    spills = sum(bool(re.match(r"(STL|LDL)\b", i.mnemonic)) for i in code)
    return {"registers": used["REG"], "spills": spills, "stack": used["STACK"]}


def machine_code(cubin: bytes) -> bytes:
    """The instructions of a cubin's one kernel: the section `.text.<name>` of an ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    start = sections[names][4]
    (code,) = [s for s in sections if cubin.startswith(b".text.", start + s[0])]
    return cubin[code[4] : code[4] + code[5]]


def parse(sass: str, sizes: Sequence[int]) -> list[tuple[list[Instruction], dict[str, int]]]:
    """The instructions of kernels that were disassembled one behind the other, and their labels.

    Args:
        sass: The disassembly.
        sizes: Bytes of each kernel.

    Returns:
        For each kernel its instructions, and where among them those stand that branches go to.
    """
    found = [line for line in map(LINE.match, sass.splitlines()) if line]
    addresses = [int(line[1], 16) for line in found]
    cuts = [bisect.bisect_left(addresses, end) for end in itertools.accumulate(sizes)]
    kernels = []
    for first, last in itertools.pairwise([0, *cuts]):
        code = [_instruction(line[2]) for line in found[first:last]]
        places = {hex(address): i for i, address in enumerate(addresses[first:last])}
        kernels.append((code, {i.jump: places[i.jump] for i in code if i.jump}))
    return kernels


def _instruction(text: str) -> Instruction:
    mnemonic = text.partition(" ")[0]
    target = TARGET.search(text) if re.match(r"(BRA|JMP)\b", mnemonic) else None
    return Instruction(text, mnemonic, target[0] if target else None)


def copy_of(instruction: Instruction) -> str | None:
    """The copy's kind and bits per thread; those by descriptor have none."""
    kind = COPY.match(instruction.mnemonic)
    if kind is None or kind[1] in ("UTMALDG", "UBLKCP"):
        return kind and kind[1]
    parts = instruction.mnemonic.split(".")
    for part, bits in {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8}.items():
        if part in parts:
            return f"{kind[1]}.{bits}"
    return f"{kind[1]}.32"


def stream_of(instruction: Instruction) -> str:
    """What distinguishes copies of one matrix from those of another: kind and bits alone."""
    return str(copy_of(instruction))


def _run(binary: bytes, tool: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(binary)
        file.flush()
        command = [str(TOOLS / tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
