"""Tables of the kernel report, from static counts alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
    "tensor",
    "issue",
    "bytes",
    "limited by",
)
LEFT = (
    *("target", "kernel", "type", "tile", "matrix instructions", "limited by", "gathers"),
    *("PREDICTED", "PREDICTED, M x N x P", "setting", "GEMM limited by", "chip"),
)


@dataclass(frozen=True)
class Line:
    """One line of a target's table."""

    title: str
    kind: str
    tile: str
    built: Built


def lines(case: Case, built: Sequence[Built]) -> list[Line]:
    """The lines of a case: its own kernel, and those launched behind it under their names."""
    kind = SHORT[case.precision if case.dtype.itemsize == 4 else case.dtype]
    rest = [Line(one.kernel.removesuffix("_kernel"), "fp32", "", one) for one in built[1:]]
    return [Line(case.title, kind, case.tile, built[0]), *rest]


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table; numbers to the right."""
    rule = "|" + "|".join("---" if name in LEFT else "---:" for name in head) + "|"
    return "\n".join([_line(head), rule, *map(_line, body)])


def target_table(found: Iterable[Line]) -> str:
    """The table of a target; kernels that several cases launch after their own have one line."""
    once = {(line.title, line.kind, line.tile): line for line in found}
    return table(HEAD, map(_cells, once.values()))


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


def _cells(line: Line) -> tuple[str, ...]:
    built, counts = line.built, line.built.counts
    warps, stages = f"{built.num_warps}", f"{built.num_stages}"
    shared = f"{counts.shared / 1024:.4g}"
    head = (line.title, line.kind, line.tile, warps, stages, _registers(counts), shared)
    loop, limits = counts.loop, built.bound
    if loop is None or limits is None:
        return (*head, *("",) * (len(HEAD) - len(head)))
    return (
        *head,
        _matrix(loop.matrix),
        f"{loop.wide_copies} of {loop.all_copies}",
        f"{built.loop:.0f}",
        f"{limits.tensor:.0f}" if limits.tensor else "",
        f"{limits.issue:.0f}",
        f"{limits.bytes:.0f}",
        limits.limited_by,
    )


def _registers(counts: Counts) -> str:
    notes = {"acc": counts.accumulators, "lanes": counts.scalar_spills}
    details = ", ".join(f"{n} {name}" for name, n in notes.items() if n)
    return f"{counts.registers} ({details})" if details else f"{counts.registers}"


def _matrix(matrix: Counter[str]) -> str:
    return ", ".join(f"{n} `{name}`" for name, n in matrix.items())


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
