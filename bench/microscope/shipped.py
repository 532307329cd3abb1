"""The shipped configurations: every kernel in every tile, with operands that suit the hardware."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from bench.microscope.cases import (
    RANK,
    SHORT,
    Case,
    K,
    M,
    N,
    P,
    empty,
    memory,
    operands,
    scalars,
    weighting,
)
from memaop_triton.kernels.gpu import stash, stash_restore
from memaop_triton.kernels.gpu.gather_gemm import gather_gemm
from memaop_triton.kernels.gpu.pack import COLUMNS, ROWS, pack_rows
from memaop_triton.kernels.gpu.rescale import rescale_
from memaop_triton.kernels.gpu.score import accumulate_and_score, accumulate_rest, row_scores
from memaop_triton.kernels.gpu.stash import round_rows
from memaop_triton.kernels.gpu.stash_restore import restore_both
from memaop_triton.kernels.gpu.subspace import project, project_gradient, transposed_mm
from memaop_triton.kernels.targets import Target
from memaop_triton.kernels.tuning import defaults
from memaop_triton.kernels.tuning.config import GemmConfig, RowConfig, padded_rank

BLOCK_ROWS = 64
RANKS = (16, 64)  # the default one and the largest


def cases(target: Target) -> list[Case]:
    """Every kernel in every tile that the rules of `defaults.py` can choose.

    Float16 only for the gather GEMM: the other kernels treat both half-precision types alike. It,
    and whole blocks in other types than bfloat16, only in the two largest tiles: they need most.
    """
    kinds = [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "ieee")]
    if target.has_tf32:
        kinds.insert(2, (torch.float32, "tf32"))
    found = [case for kind in kinds for case in _gather(target, *kind)]
    found += _variants(target)
    for dtype, precision in kinds:
        if dtype != torch.float16:
            found += _subspace(dtype, precision)
    pack = partial(pack_rows, memory(torch.bfloat16), **operands(torch.bfloat16), **scalars())
    tile = RowConfig(ROWS, COLUMNS, 4)  # which is fixed, and has no loop
    found.append(Case("pack", tile, pack, torch.bfloat16, shown=False))
    return [*found, *stashes(), *_row_passes(target)]


def stashes(n: int = N) -> Iterator[Case]:
    """Rows of `n` columns rounded and restored: few bits and many, without a basis and with two."""
    at_odd = "" if n == N else ", odd extents"
    for dtype in (torch.bfloat16, torch.float32):
        given = operands(dtype, n)
        weights = empty(K, dtype=torch.float32)
        for bits, rank in ((4, 0), (8, 0), (4, RANK), (8, RANKS[-1])):
            expand = empty(rank, -(-n // 8) * 8, dtype=torch.bfloat16)[:, :n] if rank else None
            title = f"{bits} bits, rank {rank}" + at_odd
            call = partial(round_rows, given["x"], bits, scalars()["seed"], expand, 64.0)
            yield Case(
                f"round to {title}",
                RowConfig(stash.ROWS, stash.WIDEST, stash.WARPS),
                call,
                dtype,
                shown=False,
            )
            numbers = empty(M, -(-n * bits // 8), dtype=torch.uint8)
            scales = empty(M, n // 64 + (n % 64).bit_count(), dtype=torch.bfloat16)
            stored = numbers, scales, scalars()["seed"]
            inside = None if expand is None else (empty(M, rank, dtype=torch.bfloat16), expand)
            rows = given["g"], given["indices"], weights, inside
            yield Case(
                f"restore from {title}",
                RowConfig(stash_restore.ROWS, stash_restore.COLUMNS, stash_restore.WARPS),
                partial(restore_both, stored, bits, n, *rows),
                dtype,
                shown=False,
            )


def _gather(target: Target, dtype: torch.dtype, precision: str) -> Iterator[Case]:
    tiles = defaults.gemm_tiles(target, dtype, precision)
    for way, block_rows in {"gather rows": 1, "gather blocks": BLOCK_ROWS}.items():
        if block_rows > 1 and not target.has_tensor_copies:
            continue
        for weighted in (False, True) if dtype == torch.bfloat16 else (True,):
            extra = weighting(dtype) if weighted else {}
            few = dtype == torch.float16 or (block_rows > 1 and dtype != torch.bfloat16)
            for tile in tiles[:2] if few else tiles:
                yield Case(
                    way + ", weighted + C" * weighted,
                    tile,
                    partial(
                        gather_gemm,
                        **operands(dtype),
                        **extra,
                        block_rows=block_rows,
                        config=tile,
                    ),
                    dtype,
                    precision,
                    gemm_bytes(tile, dtype.itemsize),
                    tile.block_p,
                    by_descriptor=block_rows > 1,
                    shown=dtype == torch.bfloat16 or tile == tiles[0],
                )


def gemm_bytes(tile: GemmConfig, itemsize: int) -> int:
    """Bytes of both operands per step."""
    return tile.block_k * (tile.block_n + tile.block_p) * itemsize


def _variants(target: Target) -> Iterator[Case]:
    """The largest tile with split rows, and with rows of weight 0 that are not read."""
    dtype = torch.bfloat16
    tile = defaults.gemm_tiles(target, dtype, "ieee")[0]
    gemm = partial(gather_gemm, **operands(dtype), **weighting(dtype))
    ways = {
        "gather rows, split 4": (replace(tile, split_k=4), gemm),
        "gather rows, padded": (tile, partial(gemm, is_padded=True)),
    }
    if target.has_tensor_copies:
        blocks = partial(gemm, is_padded=True, block_rows=BLOCK_ROWS)
        ways["gather blocks, padded"] = (tile, blocks)
    for title, (chosen, call) in ways.items():
        yield Case(
            title,
            chosen,
            partial(call, config=chosen),
            dtype,
            "ieee",
            gemm_bytes(chosen, dtype.itemsize),
            chosen.block_p,
            by_descriptor="blocks" in title,
            shown="padded" not in title,
        )


def _subspace(dtype: torch.dtype, precision: str) -> Iterator[Case]:
    x, rest = empty(M, N, dtype=dtype), empty(M, dtype=torch.float32)
    for rank in RANKS:
        q, z = empty(N, rank, dtype=dtype), empty(M, rank, dtype=dtype)
        tall, wide = defaults.projection_tiles(dtype, rank), defaults.transposed_tiles(dtype, rank)
        backward = partial(project_gradient, x, z, rest, bias_grad=True)
        # Title, call, tile, and the tile's extents along the result and along the sum.
        ways = [
            (f"Z = XQ, rank {rank}", partial(project, x, q, 64.0), t, t.block_m, t.block_c)
            for t in tall
        ]
        products = {f"GᵀZ and scores, rank {rank}": backward}
        if rank == RANK:
            products[f"XᵀZ, rank {rank}"] = partial(transposed_mm, z, x)
        ways += [
            (title, call, t, t.block_c, t.block_m) for title, call in products.items() for t in wide
        ]
        for title, call, tile, extent, along in ways:
            yield Case(
                title,
                tile,
                partial(call, config=tile),
                dtype,
                precision,
                tile.block_m * tile.block_c * dtype.itemsize,
                extent,
                side_bytes=along * padded_rank(rank) * dtype.itemsize,
                shown=tile in (tall[0], wide[0]) or (dtype == torch.bfloat16 and rank == RANK),
            )


def row_tiles() -> list[tuple[RowConfig, bool]]:
    """Every tile that the passes over rows can get, and whether it is one for column sums."""
    return [(tile, sums) for sums in (False, True) for tile in defaults.row_tiles(sums=sums)]


def _row_passes(target: Target) -> Iterator[Case]:
    half, single = torch.bfloat16, torch.float32
    usual = [defaults.for_rows(target, M, sums) for sums in (True, False)]
    for tile, sums in row_tiles():
        ways = {"bias_grad": sums, "config": tile}
        update = {**scalars(), **ways, "signed": True}
        size, suffix = tile.block_m * tile.block_c, ", bias sums" * sums
        for dtype, stored in ((half, half), (half, single), (single, single)):
            x, g = empty(M, N, dtype=dtype), empty(M, P, dtype=dtype)
            slots, title = memory(stored), f"memory {SHORT[stored]}" + suffix
            calls = {f"accumulate, {title}": partial(accumulate_and_score, slots, x, g, **update)}
            if dtype == stored:
                calls["scores" + suffix] = partial(row_scores, x, g, **ways)
            if stored == half:
                marks = {"taken": empty(M, dtype=torch.bool), "poisoned": empty(P, dtype=dtype)}
                rest = partial(accumulate_rest, slots, x, g, **marks, **update)
                calls[f"accumulate rest, {title}"] = rest
                if not sums:
                    factor = empty(1, dtype=single)
                    calls["rescale"] = partial(rescale_, slots[1], factor, config=tile)
            for name, call in calls.items():
                kept = 0 if name.startswith(("scores", "rescale")) else stored.itemsize
                yield Case(
                    name,
                    tile,
                    call,
                    dtype,
                    step_bytes=size * (dtype.itemsize + kept),
                    side_bytes=size * kept,
                    shown=tile in usual,
                )
