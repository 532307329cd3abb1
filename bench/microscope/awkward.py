"""Calls whose operands do not suit the hardware: other code is compiled, and no table shows them.

Extents that are not multiples of 16, columns that are not neighbours, odd ranks, and matrices of
2³¹ elements and more.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.microscope.cases import (
    Case,
    K,
    M,
    empty,
    memory,
    operands,
    scalars,
    weighting,
)
from bench.microscope.shipped import stashes
from memaop_triton.kernels.gpu import stash
from memaop_triton.kernels.gpu.gather_gemm import gather_gemm
from memaop_triton.kernels.gpu.pack import COLUMNS, ROWS, pack_rows
from memaop_triton.kernels.gpu.score import accumulate_and_score, row_scores
from memaop_triton.kernels.gpu.subspace import correction, project, project_gradient
from memaop_triton.kernels.targets import Target
from memaop_triton.kernels.tuning import defaults
from memaop_triton.kernels.tuning.config import GemmConfig, RowConfig

ODD = 4095
HALF = torch.bfloat16


def awkward_cases(target: Target) -> list[Case]:
    """The tiles that the rules choose for such operands, the large ones of them."""
    even = defaults.gemm_tiles(target, HALF, "ieee")
    uneven = defaults.gemm_tiles(target, HALF, "ieee", aligned=False)
    gemms = {
        "odd extents": (uneven, operands(HALF, ODD, ODD) | weighting(HALF, ODD, ODD)),
        "strided": (uneven, strided(operands(HALF)) | weighting(HALF)),
        "cut blocks": (uneven, operands(HALF, ODD, ODD) | {"block_rows": 16}),
        "odd rank": (even, operands(HALF) | weighting(HALF, rank=5)),
        "far": (even, far() | weighting(HALF)),
    }
    found = [
        Case(f"gather rows, {name}", tile, partial(gather_gemm, **given, config=tile), HALF)
        for name, (tiles, given) in gemms.items()
        for tile in tiles[: 2 if name == "odd extents" else 1]
    ]
    return [*found, *_packed(), *_rounded(), *_subspace(uneven[-1]), *_row_passes(target)]


def _packed() -> Iterator[Case]:
    tile = RowConfig(ROWS, COLUMNS, 4)
    for name, given, slots in (
        ("odd extents", operands(HALF, ODD, ODD), memory(HALF, ODD, ODD)),
        ("strided", strided(operands(HALF)), memory(HALF)),
        ("far", far(), far_memory()),
    ):
        call = partial(pack_rows, slots, **given, **scalars(), signed=True)
        yield Case(f"pack, {name}", tile, call, HALF)


def _rounded() -> Iterator[Case]:
    yield from stashes(ODD)
    tile = RowConfig(stash.ROWS, stash.WIDEST, stash.WARPS_OF_OTHERS)
    for name, given in (("strided", strided(operands(HALF))), ("far", far())):
        call = partial(stash.round_rows, given["x"], 4, scalars()["seed"])
        yield Case(f"round, {name}", tile, call, HALF)


def _subspace(small: GemmConfig) -> Iterator[Case]:
    x, rest = empty(M, ODD, dtype=HALF), empty(M, dtype=torch.float32)
    for rank in (17, 63):
        q, z = empty(ODD, rank, dtype=HALF), empty(M, rank, dtype=HALF)
        tall = defaults.projection_tiles(HALF, rank, aligned=False)[0]
        wide = defaults.transposed_tiles(HALF, rank, aligned=False)[0]
        call = partial(project, x, q, 64.0, config=tall)
        yield Case(f"Z = XQ, odd extents, rank {rank}", tall, call, HALF)
        call = partial(project_gradient, x, z, rest, config=wide)
        yield Case(f"GᵀZ, odd extents, rank {rank}", wide, call, HALF)
    z, parts = empty(M, 5, dtype=HALF), empty(2, ODD, 5, dtype=torch.float32)
    indices = empty(K, dtype=torch.int64)
    call = partial(correction, parts, z, x, indices, rest[:K], config=small)
    yield Case("correction, rank 5", small, call, HALF)


def _row_passes(target: Target) -> Iterator[Case]:
    x, tile = empty(M, ODD, dtype=HALF), defaults.for_rows(target, M, True)
    ways = {"bias_grad": True, "config": tile}
    yield Case("scores, odd extents", tile, partial(row_scores, x, x, **ways), HALF)
    slots = memory(HALF, ODD, ODD)
    call = partial(accumulate_and_score, slots, x, x, **scalars(), signed=True, **ways)
    yield Case("accumulate, odd extents", tile, call, HALF)


def strided(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same matrices with columns two elements apart."""
    x, g = (
        empty(a.shape[0], 2 * a.shape[1], dtype=a.dtype)[:, ::2] for a in (given["x"], given["g"])
    )
    return given | {"x": x, "g": g}


def far() -> dict[str, Tensor]:
    """Matrices with rows beyond element 2³¹."""
    return operands(HALF) | {name: empty(1 << 20, 4096, dtype=HALF) for name in "xg"}


def far_memory() -> tuple[Tensor, Tensor, Tensor]:
    """A memory for these."""
    slots = empty(1 << 20, 4096, dtype=HALF)
    return slots, slots, empty(1 << 20, dtype=torch.bool)
