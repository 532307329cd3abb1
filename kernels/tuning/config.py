"""How a launch is cut into programs: the fields of a configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GemmConfig:
    """A tile of the gather GEMMs.

    Attributes:
        block_n: Columns of X per program.
        block_p: Columns of G per program.
        block_k: Rows per step.
        split_k: Number of programs that share the rows of a tile.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
        group: Tiles along P that neighbouring programs cover before they move along N.
        tiles_n: Pieces in which the columns of X are loaded and multiplied: two narrow ones need
            fewer row addresses than a wide one.
        x_columns_first: Orientation in which X is loaded. Units that read both operands from shared
            memory want the columns first; those that read from registers want the rows first. The
            residual GEMM, which computes its operands, has only the first way.
    """

    block_n: int
    block_p: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    group: int = 8
    tiles_n: int = 1
    x_columns_first: bool = False


@dataclass(frozen=True)
class RowConfig:
    """A tile of the passes over rows.

    Attributes:
        block_m: Rows per program.
        block_c: Columns per step.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
        split: Number of programs that share the rows, for products over all rows.
    """

    block_m: int
    block_c: int
    num_warps: int
    num_stages: int = 2
    split: int = 1


Config = GemmConfig | RowConfig
