"""What gathering costs: the gather GEMM's loop beside that of a plain GEMM of the same tile."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from bench.microscope.cases import SHORT, Case, K, N, P, empty
from memaop_triton.bench.suites.plain_gemm import plain_gemm
from memaop_triton.kernels.targets import Target
from memaop_triton.kernels.tuning import defaults

HALF = torch.bfloat16


@dataclass(frozen=True)
class Pair:
    """Two cases of one target that differ in gathering only.

    Attributes:
        way: "rows" or "blocks of rows".
        weighted: Whether rows of G are multiplied by weights in both.
        gathering: The name of the gathering case.
        plain: The other case.
    """

    way: str
    weighted: bool
    gathering: str
    plain: Case


def pairs(target: Target) -> list[Pair]:
    """All pairs of a target, in bfloat16; the smallest tiles do not matter."""
    given = {"x": empty(K, N, dtype=HALF), "g": empty(K, P, dtype=HALF)}
    ways = {"rows": ("gather rows", "plain by pointers")}
    if target.has_tensor_copies:
        ways["blocks of rows"] = ("gather blocks", "plain by descriptors")
    found = []
    for way, (gathering, title) in ways.items():
        for weighted in (False, True):
            weights = empty(K, dtype=torch.float32) if weighted else None
            for tile in defaults.gemm_tiles(target, HALF, "ieee"):
                if tile.block_n < 64:
                    continue
                call = partial(
                    plain_gemm,
                    **given,
                    weights=weights,
                    by_descriptor=way != "rows",
                    config=tile,
                )
                plain = Case(title + ", weighted" * weighted, tile, call, HALF)
                name = gathering + ", weighted + C" * weighted
                found.append(Pair(way, weighted, f"{name}, {plain.tile}, {SHORT[HALF]}", plain))
    return found
