"""The kernel report: one table per target, from static counts alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import triton

from bench.microscope.bound import CHIPS, Bound, bound
from bench.microscope.compiling import Compiled
from bench.microscope.counts import Counts
from bench.microscope.reading import read

HEAD = (
    "kernel",
    "config",
    "registers",
    "spills",
    "shared, KiB",
    "matrix instructions",
    "16-byte copies",
    "loop",
    "tensor",
    "issue",
    "bytes",
    "limited by",
    "plain loop",
    "ratio",
)
LEGEND = """\
Compiled by Triton {version}, not run. *loop*: instructions per iteration of the inner loop, as one
warp issues them. *16-byte copies*: of all copies from global memory in the loop, those of 16 bytes
per thread or of whole tiles. *tensor*, *issue*, *bytes*: cycles of one SM (compute unit) that an
iteration takes at least, by matrix FLOPs, by issue slots and by bytes from L2, predicted from
these counts and the vendors' peaks. *plain loop*: the loop of a GEMM of the same tile that does not
gather, and *ratio* what gathering costs in instructions.
"""


@dataclass(frozen=True)
class Row:
    """One kernel in one configuration on one target.

    Attributes:
        name: What the report calls the kernel.
        config: Tile, warps, stages and split.
        compiled: What was compiled.
        counts: What was counted.
        bound: What limits the loop, if there is one.
        plain: Loop instructions of the plain GEMM of the same tile, where that says something.
    """

    name: str
    config: str
    compiled: Compiled
    counts: Counts
    bound: Bound | None
    plain: float | None = None


def row(compiled: Compiled, name: str | None = None, plain: float | None = None) -> Row:
    """The report's row for a compiled kernel."""
    counts = read(compiled)
    config = _config(compiled)
    return Row(
        name or compiled.launch.name, config, compiled, counts, bound(compiled, counts), plain
    )


def report(rows: Iterable[Row]) -> str:
    """A Markdown table for every target, in the order in which the targets first appear."""
    by_target: dict[str, list[Row]] = {}
    for one in rows:
        by_target.setdefault(one.compiled.target.name, []).append(one)
    parts = [LEGEND.format(version=triton.__version__)]
    for target, group in by_target.items():
        parts += [
            f"## {target}: {CHIPS[target].name}\n",
            _line(HEAD),
            "|---|---|" + "---:|" * 3 + "---|" + "---:|" * 5 + "---|---:|---:|",
            *(_line(_cells(one)) for one in group),
            "",
        ]
    return "\n".join(parts)


def _config(compiled: Compiled) -> str:
    launch = compiled.launch
    tile = [v for k, v in launch.constants.items() if k.startswith("BLOCK") and _is_number(v)]
    split = [v for k, v in launch.constants.items() if k.startswith("SPLIT") and _is_number(v)]
    parts = ["x".join(map(str, tile))] if tile else []
    parts += [f"{launch.num_warps} warps", f"{launch.num_stages} stages"]
    return ", ".join(parts + [f"split {v}" for v in split if v > 1])


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _cells(one: Row) -> tuple[str, ...]:
    counts, loop, limits = one.counts, one.counts.loop, one.bound
    registers = f"{counts.registers}"
    if counts.accumulators:
        registers += f" ({counts.accumulators} acc)"
    head = (one.name, one.config, registers, f"{counts.spills}", _shared(one))
    if loop is None or limits is None:
        return (*head, *("",) * 9)
    return (
        *head,
        _matrix(loop.matrix),
        f"{loop.wide_copies} of {loop.all_copies}",
        f"{loop.per_iteration:.0f}",
        f"{limits.tensor:.0f}" if limits.tensor else "",
        f"{limits.issue:.0f}",
        f"{limits.bytes:.0f}",
        limits.limited_by,
        f"{one.plain:.0f}" if one.plain else "",
        f"{loop.per_iteration / one.plain:.2f}" if one.plain else "",
    )


def _shared(one: Row) -> str:
    used, limit = one.counts.shared, one.compiled.target.shared_memory
    return f"{used / 1024:.4g} of {limit >> 10}" + (" (too much)" if used > limit else "")


def _matrix(matrix: Counter[str]) -> str:
    return ", ".join(f"{n} `{name}`" for name, n in matrix.items())


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
