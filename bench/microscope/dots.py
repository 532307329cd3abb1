"""The matrix products of a kernel's inner loop, as Triton's GPU dialect writes them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

PRODUCT = re.compile(r"\b(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) ")
SHAPE = re.compile(r"(?:tensor|memdesc)<(\d+)x(\d+)x(\w+), (.*?)(?:, #smem|, mutable|>)")
ALIAS = re.compile(r"^(#\w+) = (#\S+<.*>)", re.MULTILINE)


@dataclass(frozen=True)
class Dot:
    """One product [m, k] times [k, n].

    Attributes:
        m: Rows of the result.
        n: Columns of the result.
        k: What is summed over.
        dtype: Of the operands: "bf16", "f16", "f32".
        step: Rows and columns that one instruction covers on all warps together; `None` if the
            product is not computed by matrix instructions.
    """

    m: int
    n: int
    k: int
    dtype: str
    step: tuple[int, int] | None

    @property
    def bits(self) -> int:
        """Bits of one element of the operands."""
        return int(re.sub(r"^\D*(\d+).*", r"\1", self.dtype))

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.n * self.k


def loop_dots(ttgir: str) -> list[Dot]:
    """The products in the body of the innermost loop that has most of them by FLOPs."""
    aliases = dict(ALIAS.findall(ttgir))
    bodies = [[_dot(line, aliases) for line in body] for body in _loop_products(ttgir)]
    return max(bodies, key=lambda dots: sum(d.flops for d in dots), default=[])


def iterations(ttgir: str, depth: Callable[[str, int], int], matrix: Counter[str]) -> float:
    """Iterations of that loop in one iteration of the machine's loop; 1 if that is not known.

    Args:
        ttgir: The kernel in Triton's GPU dialect.
        depth: The K of a matrix instruction by mnemonic and bits of its operands.
        matrix: Matrix instructions per warp in the machine's loop by mnemonic.
    """
    dots = loop_dots(ttgir)
    if not matrix or not dots:
        return 1.0
    mnemonic = matrix.most_common(1)[0][0]
    expected = sum(
        math.ceil(dot.m / dot.step[0])
        * math.ceil(dot.n / dot.step[1])
        * math.ceil(dot.k / depth(mnemonic, dot.bits))
        for dot in dots
        if dot.step is not None
    )
    return max(matrix.total() / expected, 1.0) if expected else 1.0


def _loop_products(ttgir: str) -> list[list[str]]:
    """Lines with products, by the innermost loop they stand in."""
    found: list[list[str]] = []
    open_loops: list[tuple[int, list[str]]] = []
    level = 0
    for line in ttgir.splitlines():
        code = line.split(" loc(")[0]
        if re.search(r"\b(scf\.for|scf\.while)\b", code):
            open_loops.append((level, []))
            found.append(open_loops[-1][1])
        elif open_loops and PRODUCT.search(code):
            open_loops[-1][1].append(code)
        level += code.count("{") - code.count("}")
        while open_loops and level <= open_loops[-1][0]:
            open_loops.pop()
    return [lines for lines in found if lines]


def _dot(line: str, aliases: dict[str, str]) -> Dot:
    left, right, result = SHAPE.findall(line)[:3]
    layout = aliases.get(result[3].split(">")[0], result[3])
    return Dot(int(left[0]), int(right[1]), int(left[1]), left[2], _step(layout))


def _step(layout: str) -> tuple[int, int] | None:
    if blocks := re.search(r"blockM = (\d+), blockN = (\d+)", layout):
        return int(blocks[1]), int(blocks[2])
    warps = re.search(r"warpsPerCTA = \[(\d+), (\d+)\]", layout)
    shape = re.search(r"instrShape = \[(\d+), (\d+)", layout)
    if warps is None or shape is None:
        return None
    return int(warps[1]) * int(shape[1]), int(warps[2]) * int(shape[2])
