"""Writes bench/results/kernel_report.md: what the compiler makes of the kernels.

python -m bench.microscope.kernel_report
"""

from __future__ import annotations

import re
from concurrent.futures import as_completed
from pathlib import Path

import triton
from rich.console import Console
from rich.progress import track

from bench.microscope import operations
from bench.microscope.building import REPORTED, Builder, Key, by_name
from bench.microscope.gathering import pairs
from bench.microscope.report import faults, table, target_table
from bench.microscope.shipped import cases
from memaop_triton.kernels.targets import TARGETS

PAGE = Path(__file__).parents[1] / "results" / "kernel_report.md"
INTRODUCTION = """\
# What the compiler makes of the kernels

Written by `make kernel-report`; a test compares it with the code. Compiled by Triton {version},
for GPUs that were not there. **Nothing on this page was timed.** Registers, shared memory and
instructions are read from the machine code.

{verdict}

Shapes: M = 16384 rows, N = P = 4096, of which K = 2048 rows are selected; blocks are 64 rows.
"""
LEGEND = """\
## How to read the tables

A program runs its loop once per step. One line is one kernel with one tile.

- *kernel*: "weighted + C" multiplies rows by weights and starts from a correction of rank 16;
  "split" shares the rows of a tile among programs; "memory" names the type of the row memory.
- *type*: of X and G. `tf32` and `fp32` are float32, multiplied as TF32 and exactly.
- *tile*: columns of G x columns of X x rows per step for a GEMM, rows x columns otherwise.
- *registers*: per thread. On AMD, "acc" of them are those that matrix units write, and "lanes" is
  how many scalar registers are kept in lanes of vector registers.
- *matrix instructions*: in the loop, per warp. Empty: the float32 lanes multiply, or nobody.
- *16-byte copies*: of the loop's copies from global memory, those of 16 bytes per thread or of
  whole tiles. The others fetch row numbers, weights and flags.
- *loop*: instructions per step, as one warp issues them.
"""
GATHERING = """\
## What gathering costs

The loop of the gather GEMM beside that of a plain Triton GEMM of the same tile, warps and stages
that reads its rows in order (`bench/suites/plain_gemm.py`), in bfloat16: instructions per step.
Single rows are compared with a GEMM by pointers, blocks with one by tensor descriptors (TMA),
weighted ones with GEMMs that multiply the rows of G by weights as well. Where the matrix units or
the L2 cache limit a loop, issue slots are left over: a ratio above 1 is not yet a slower loop.
"""


def page(builder: Builder) -> str:
    """The whole page."""
    parts = [
        INTRODUCTION.format(version=triton.__version__, verdict=_verdict(builder)),
        LEGEND,
        GATHERING,
        _gathering(builder),
        "",
        operations.section(),
    ]
    for target in REPORTED:
        limit = TARGETS[target].shared_memory >> 10
        found = [case for case in cases(TARGETS[target]) if case.shown]
        parts += [
            f"\n## {target}: {TARGETS[target].chip.name}\n",
            f"Shared memory: at most {limit} KiB per program.\n",
            target_table((case, builder[target, case.name]) for case in found),
        ]
    return "\n".join(parts) + "\n"


def version_of_page() -> str:
    """The Triton that the page was written with."""
    return re.findall(r"Compiled by Triton (\S+),", PAGE.read_text(encoding="utf-8"))[0]


def keys() -> list[Key]:
    """Everything that the page needs."""
    return [(target, name) for target in REPORTED for name in by_name(target)]


def _verdict(builder: Builder) -> str:
    ours = [key for key in keys() if not key[1].startswith("plain")]
    wrong = [fault for key in ours for built in builder[key] for fault in faults(*key, built)]
    total = sum(len(builder[key]) for key in ours)
    if wrong:
        return "**Not in order:**\n\n" + "\n".join(f"- {fault}" for fault in wrong)
    return (
        f"All {total} kernels that were compiled, more than the tables show, keep their values in"
        "\nregisters (no spills, no stack) and fit into shared memory."
    )


def _gathering(builder: Builder) -> str:
    head = ("target", "gathers", "tile", "plain", "gather", "ratio")
    body: dict[tuple[str, ...], list[str]] = {}
    for target in REPORTED:
        for pair in pairs(TARGETS[target]):
            loop = builder.loop((target, pair.gathering))
            plain = builder.loop((target, pair.plain.name))
            numbers = body.setdefault((target, pair.way, pair.plain.tile), [])
            numbers += [f"{plain}", f"{loop}", f"{loop / plain:.2f}"]
    weighted = ("weighted plain", "weighted gather", "ratio")
    return table((*head, *weighted), ((*key, *numbers) for key, numbers in body.items()))


def main() -> None:
    """Compile, read and write, with a progress bar."""
    console = Console()
    with Builder() as builder:
        futures = builder.start(keys())
        for future in track(
            as_completed(futures), "compiling", total=len(futures), console=console
        ):
            future.result()
        text = page(builder)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")
    console.print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
