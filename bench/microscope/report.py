"""Tables of the kernel report, from static counts alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from bench.microscope.building import Built
from bench.microscope.cases import SHORT, Case
from bench.microscope.counts import Counts
from memaop_triton.kernels.targets import TARGETS

HEAD = (
    "kernel",
    "type",
    "tile",
    "warps",
    "stages",
    "registers",
    "shared, KiB",
    "matrix instructions",
    "16-byte copies",
    "loop",
)
LEFT = (
    *("target", "kernel", "type", "tile", "matrix instructions", "gathers"),
    *("PREDICTED", "PREDICTED, M x N x P", "setting", "GEMM limited by", "chip"),
)


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table; numbers to the right."""
    rule = "|" + "|".join("---" if name in LEFT else "---:" for name in head) + "|"
    return "\n".join([_line(head), rule, *map(_line, body)])


def target_table(found: Iterable[tuple[Case, Sequence[Built]]]) -> str:
    """The table of a target: each case's own kernel, and those launched behind it by their names.

    A kernel that several cases launch behind their own has one line.
    """
    once = {}
    for case, (own, *behind) in found:
        kind = SHORT[case.precision if case.dtype.itemsize == 4 else case.dtype]
        once[case.title, kind, case.tile] = own
        once |= {(one.kernel.removesuffix("_kernel"), "fp32", ""): one for one in behind}
    return table(HEAD, ((*line, *_cells(built)) for line, built in once.items()))


def faults(target: str, name: str, built: Built, *, spare: int = 0) -> list[str]:
    """What must not be: spills, a stack of more than `spare` bytes, too much shared memory.

    Scalar registers that AMD's compiler keeps in lanes of a vector register cost no memory access.
    """
    counts, limit = built.counts, TARGETS[target].shared_memory
    spilled = counts.stack > spare or (counts.spills > 0 and not spare)
    found = {
        f"{counts.spills} spills, a stack of {counts.stack} bytes": spilled,
        f"{counts.shared} of {limit} bytes of shared memory": counts.shared > limit,
    }
    return [f"{target}, {name}, {built.kernel}: {what}" for what, wrong in found.items() if wrong]


def _cells(built: Built) -> tuple[str, ...]:
    counts, loop = built.counts, built.counts.loop
    head = (
        f"{built.num_warps}",
        f"{built.num_stages}",
        _registers(counts),
        f"{counts.shared / 1024:.4g}",
    )
    if loop is None:
        return (*head, "", "", "")
    copies = f"{loop.wide_copies} of {loop.copies.total()}"
    return (*head, _matrix(loop.matrix), copies, f"{loop.instructions}")


def _registers(counts: Counts) -> str:
    notes = {"acc": counts.accumulators, "lanes": counts.scalar_spills}
    details = ", ".join(f"{n} {name}" for name, n in notes.items() if n)
    return f"{counts.registers} ({details})" if details else f"{counts.registers}"


def _matrix(matrix: Counter[str]) -> str:
    return ", ".join(f"{n} `{name}`" for name, n in matrix.items())


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
