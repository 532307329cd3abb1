"""What is read off listings: loops, and copies by width."""

import re

import pytest

from bench.microscope import amd, nvidia
from bench.microscope.loops import hottest


def sass(*lines):
    """A listing as nvdisasm writes it, of which 16 bytes are one instruction."""
    addresses, code = {}, []
    for line in lines:
        if line.startswith(".L"):
            addresses[line.rstrip(":")] = hex(16 * len(code))
        else:
            code.append(line)
    code = [re.sub(r"\.L_\d+", lambda label: addresses[label[0]], line) for line in code]
    return "\n".join(f"        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(code))


NOTES = "     &req={4,0}  &wr=0x0 ?trans6"
LOOPS = {
    "retries behind it are left out": (
        [
            ".L_1:",
            "SYNCS.TRYWAIT P0, [UR4]",
            "@!P0 BRA .L_2",
            ".L_3:",
            "HMMA.16816 R0, R1",
            "@P1 BRA .L_1",
            "EXIT",
            ".L_2:",
            "SYNCS.TRYWAIT P0, [UR4]",
            "@!P0 BRA .L_2",
            "BRA .L_3",
        ],
        ["SYNCS.TRYWAIT", "BRA", "HMMA.16816", "BRA"],
    ),
    "notes behind an instruction are no part of it": (
        [".L_1:", f"LDG.E.128 R0, R1{NOTES}", f"BRA.U !UP0, .L_1{NOTES}", "EXIT"],
        ["LDG.E.128", "BRA.U"],
    ),
    "as many products stand before it": (
        ["UTCHMMA gdesc", ".L_1:", "UTCHMMA gdesc", "BRA.U UP0, .L_1", "EXIT"],
        ["UTCHMMA", "BRA.U"],
    ),
    "the inner of two": (
        [
            ".L_1:",
            "MOV R1, R2",
            ".L_2:",
            "HMMA.16816 R0, R1",
            "@P0 BRA .L_2",
            "LDG.E.128 R0, R1",
            "@P1 BRA .L_1",
            "EXIT",
        ],
        ["HMMA.16816", "BRA"],
    ),
}


@pytest.mark.parametrize(("lines", "expected"), LOOPS.values(), ids=LOOPS)
def test_the_loop_of_a_kernel(lines, expected):
    ((code, labels),) = nvidia.parse(sass(*lines), [16 * len(lines)])
    loop = hottest(code, labels, nvidia.MATRIX, nvidia.COPY)
    assert [instruction.mnemonic for instruction in loop] == expected


def test_kernels_one_behind_the_other_are_told_apart():
    listing = sass("MOV R1, R2", "EXIT", ".L_1:", "MOV R3, R4", "@P0 BRA .L_1", "EXIT")
    (first, no_labels), (second, labels) = nvidia.parse(listing, [32, 48])
    assert [i.mnemonic for i in first] == ["MOV", "EXIT"]
    assert [i.mnemonic for i in second] == ["MOV", "BRA", "EXIT"]
    assert no_labels == {}
    assert labels == {"0x20": 0}


def test_amd_loops_are_found_by_their_labels():
    text = "\ts_mov_b32 s0, 0\n.LBB0_1: ; %loop\n\tv_mfma_f32_32x32x8_bf16 v0, v1 ; 1\n\t.loc 1 2\n"
    code, labels = amd.parse(text + "\ts_cbranch_scc1 .LBB0_1\n; %bb.2:\n\ts_endpgm\n")
    loop = hottest(code, labels, amd.MATRIX, amd.COPY)
    assert [i.mnemonic for i in loop] == ["v_mfma_f32_32x32x8_bf16", "s_cbranch_scc1"]


@pytest.mark.parametrize(
    ("vendor", "instruction", "name"),
    [
        (amd, "buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen", "buffer_load.128"),
        (amd, "buffer_load_dwordx4 v4, s[0:3], 0 offen lds", "buffer_load_lds.128"),
        (amd, "global_load_lds_dwordx4 v[0:1], off", "global_load_lds.128"),
        (amd, "global_load_ushort v0, v[0:1], off", "global_load.16"),
        (amd, "global_load_dword v0, v[0:1], off", "global_load.32"),
        (nvidia, "LDGSTS.E.BYPASS.LTC128B.128", "LDGSTS.128"),
        (nvidia, "LDGSTS.E.LTC128B.64", "LDGSTS.64"),
        (nvidia, "LDG.E.LTC128B", "LDG.32"),
        (nvidia, "LDG.E.U16.CONSTANT", "LDG.16"),
        (nvidia, "LDG.E.ENL2.256", "LDG.256"),
        (nvidia, "UTMALDG.2D", "UTMALDG"),
        (nvidia, "LDS.128", None),
    ],
)
def test_copies_by_kind_and_width(vendor, instruction, name):
    assert vendor.copy_of(vendor._instruction(instruction)) == name
