"""What gathering costs: the gather GEMM's loop beside that of a plain GEMM of the same tile."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.microscope.building import Builder
from bench.microscope.cases import SHORT, compared_tiles
from memaop_triton.kernels.targets import Target
from memaop_triton.kernels.tuning.config import GemmConfig

WAYS = (
    ("rows", "gather rows", "plain by pointers"),
    ("blocks of rows", "gather blocks", "plain by descriptors"),
)


@dataclass(frozen=True)
class Pair:
    """Two cases of one target that differ in gathering only.

    Attributes:
        tile: The tile of both.
        way: "rows" or "blocks of rows".
        weighted: Whether rows of G are multiplied by weights in both.
        gathering: The name of the gathering case.
        plain: The name of the other.
    """

    tile: GemmConfig
    way: str
    weighted: bool
    gathering: str
    plain: str

    def loops(self, builder: Builder, target: str) -> tuple[float, float]:
        """Instructions per iteration of the gathering loop and of the plain one."""
        return builder[target, self.gathering][0].loop, builder[target, self.plain][0].loop


def pairs(target: Target) -> list[Pair]:
    """All pairs of a target, in bfloat16."""
    found = []
    for way, gathering, plain in WAYS[: 2 if target.has_tensor_copies else 1]:
        for weighted in (False, True):
            for tile in compared_tiles(target):
                name = f"{tile.block_p}x{tile.block_n}x{tile.block_k}, {SHORT[torch.bfloat16]}"
                found.append(
                    Pair(
                        tile,
                        way,
                        weighted,
                        gathering + ", weighted + C" * weighted + f", {name}",
                        plain + ", weighted" * weighted + f", {name}",
                    )
                )
    return found
