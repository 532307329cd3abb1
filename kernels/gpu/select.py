"""Selection of K of M rows by their scores: draws, keys, the K largest of them, ascending, weights.

A unit is a row, or `block_rows` neighbouring rows whose score is the sum of theirs. Unit m gets the
random number u_m from a counter-based generator: of the words that Philox 4x32-10 makes of the seed
and m // 4, the (m mod 4)-th. So a selection is a function of scores, seed and policy, whatever the
launch looks like. Its key is a float32 that is not negative, and so is ordered like its bits:

    topk        s                       randk, uniform   u
    priority    s/u                     bernoulli        u/p if u <= p else 0, p = min(1, λs)
    weightedk   s/√(−log u)             any              ∞ if s is not finite

(The K largest s²/e for exponential e have the law of K draws without replacement, p ∝ s².)

The bits of the (K+1)-th largest key τ are found from the highest down: a bit is set if at least
K+1 keys are not below what is known then. The units above τ are taken, then those equal to τ by
their number. A prefix sum over "is taken" gives each its place, so the order is ascending.

Up to `ONE_PROGRAM` units one program does all of it in one launch. Beyond that, programs share the
units, in six launches (`select_shared.py`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memaop_triton.kernels import targets
from memaop_triton.kernels.gpu import launch
from memaop_triton.kernels.gpu.row_weights import (
    RowWeights,
    dtype_of_factors,
    empty_scaled,
    store_scaled,
)
from memaop_triton.kernels.gpu.select_shared import chunk_of, select_by_several
from memaop_triton.kernels.gpu.selection_keys import (
    draw_chunk,
    places_of,
    store_units,
    unit_scores,
    weights_of,
)

ONE_PROGRAM = 1 << 14
WARPS = 16
POLICIES = ("topk", "priority", "randk", "uniform", "weightedk", "bernoulli")


@triton.jit
def _ranked_key(keys, wanted):
    """The `wanted`-th largest key, bit by bit.

    A histogram of the upper bits would take fewer rounds. But Triton forms one by ballots within
    warps, some 90 instructions a key and digit, where a comparison and a sum take two a bit.
    """
    threshold = 0
    for bit in range(0, 31):
        trial = threshold | (0x40000000 >> bit)
        at_least = tl.sum((keys >= trial).to(tl.int32), 0)
        threshold = tl.where(at_least >= wanted, trial, threshold)
    return threshold


@triton.jit(do_not_specialize=["M", "units", "K", "same", "seed"])
def select_kernel(
    scores_ptr, keys_ptr, slope_ptr, indices_ptr, weights_ptr, factors_ptr, scale_ptr, filled_ptr,
    taken_ptr, seed, M, units, K, same,
    POLICY: tl.constexpr, BLOCK_ROWS: tl.constexpr, CHUNK: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """All of it in one program, which holds nothing but the keys while it looks for τ."""
    slope = 1.0
    if POLICY == "bernoulli":
        slope = tl.load(slope_ptr)
    chunk = tl.arange(0, CHUNK)
    for first in range(0, units, CHUNK):
        draw_chunk(scores_ptr, keys_ptr, seed, first, slope, units, M, POLICY, BLOCK_ROWS, CHUNK)
    tl.debug_barrier()  # each thread reads keys that another one has stored

    all_units = tl.arange(0, HELD)
    held = tl.load(keys_ptr + all_units, mask=all_units < units, other=-1)
    threshold = _ranked_key(held, tl.minimum(K + 1, units))
    quota = K - tl.sum((held > threshold).to(tl.int32), 0)
    surplus = tl.maximum(tl.div_rn(tl.sum((held > 0).to(tl.int32), 0) * 1.0, K * 1.0), 1)

    bound = threshold.to(tl.float32, bitcast=True)
    above, equal = 0, 0
    for first in range(0, units, CHUNK):
        inside = first + chunk < units
        keys = tl.load(keys_ptr + first + chunk, mask=inside, other=-1)
        score = unit_scores(scores_ptr, first + chunk, inside, M, BLOCK_ROWS)
        place, taken, more_above, more_equal = places_of(keys, threshold, above, equal, quota)
        weight = weights_of(score, keys, bound, slope, surplus, same, POLICY)
        store_units(
            first + chunk, inside, place, taken, weight, M, indices_ptr, weights_ptr,
            factors_ptr if scale_ptr is None else None, filled_ptr, taken_ptr, BLOCK_ROWS,
        )  # fmt: skip
        above += more_above
        equal += more_equal
    if scale_ptr is not None:
        tl.debug_barrier()
        store_scaled(weights_ptr, factors_ptr, scale_ptr, K * BLOCK_ROWS, CHUNK)


@triton.jit(do_not_specialize=["M", "units", "K"])
def slope_kernel(
    scores_ptr, slope_ptr, M, units, K,
    BLOCK_ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """λ with Σ min(1, λ s) = K over the finite scores, by one program.

    With c units at probability 1, λ = (K − c)/(the sum of the others). A larger λ makes more units
    certain, so this is repeated until a round adds none: a few times in practice, K at most.
    """
    slope, certain, before = 0.0, -1, -2
    while certain > before:
        before = certain
        rest = tl.zeros((CHUNK,), tl.float32)
        sure = tl.zeros((CHUNK,), tl.int32)
        for first in range(0, units, CHUNK):
            each = first + tl.arange(0, CHUNK)
            score = unit_scores(scores_ptr, each, each < units, M, BLOCK_ROWS)
            is_sure = (score * slope >= 1) | (score == float("inf"))
            sure += is_sure.to(tl.int32)
            rest += tl.where(is_sure, 0, score)
        certain = tl.sum(sure, 0)
        total = tl.sum(rest, 0)
        left = tl.maximum(K - certain, 0) * 1.0
        slope = tl.where(total > 0, tl.div_rn(left, total), float("inf"))
    tl.store(slope_ptr, slope)


class Selected(NamedTuple):
    """Row numbers in ascending order, int64, and their weights, float32; both of shape [K].

    `factors` are the weights as `gather_gemm` takes them, `None` unless they were asked for.
    """

    indices: Tensor
    weights: Tensor
    factors: RowWeights | None


def select(
    scores: Tensor | None,
    k: int,
    policy: str,
    seed: int | Tensor,
    *,
    block_rows: int = 1,
    dtype: torch.dtype | None = None,
    filled: Tensor | None = None,
    taken: Tensor | None = None,
) -> Selected:
    """Pick units by the scores of their rows.

    Args:
        scores: [M] float32, not negative, contiguous. What is not finite comes before all else.
            `None` if all rows are alike, as many as `taken` has.
        k: Units to pick (`bernoulli`: to expect), from 1 to less than ⌈M/block_rows⌉, all of them.
        policy: One of `POLICIES`.
        seed: Of the draws, from 0 to 2⁶³ − 1, or int64 [1] on the device.
        block_rows: Neighbouring rows in a unit, a power of two.
        dtype: Of the rows that the weights' factors are for; none are made if `None`.
        filled: [M] bool, set to false for the rows selected.
        taken: [M] bool, set to whether a row was selected.

    Returns:
        The rows of `k` units, of `bernoulli` those of some more units, of which the ones that were
        not drawn have weight 0. A last block that M cuts short names rows from M on.
    """
    like = taken if scores is None else scores
    if like is None:
        raise ValueError("either scores or taken must say how many rows there are.")
    rows, device = like.numel(), like.device
    units = triton.cdiv(rows, block_rows)
    of_units: dict[str, Any] = {
        "scores_ptr": scores, "M": rows, "units": units, "BLOCK_ROWS": block_rows,
        "CHUNK": chunk_of(units, block_rows, policy),
    }  # fmt: skip
    slope = None
    if policy == "bernoulli":
        slope = torch.empty(1, dtype=torch.float32, device=device)
        launch.launch(slope_kernel, (1,), slope_ptr=slope, K=k, num_warps=WARPS, **of_units)
        k = min(units, k + 6 * math.isqrt(k) + 6)
    indices = torch.empty(k * block_rows, dtype=torch.int64, device=device)
    weights = torch.empty(k * block_rows, dtype=torch.float32, device=device)
    factors = None if dtype is None else _room_for_factors(weights, dtype)
    # Of float32 rows the factors are the weights themselves.
    stored = None if factors is None or factors.factors is weights else factors.factors
    keys = torch.empty(units, dtype=torch.int32, device=device)
    draw: dict[str, Any] = {"keys_ptr": keys, "slope_ptr": slope, "POLICY": policy, **of_units}
    out: dict[str, Any] = {
        "indices_ptr": indices, "weights_ptr": weights,
        "factors_ptr": stored, "scale_ptr": None if factors is None else factors.scale,
        "filled_ptr": None if filled is None else filled.view(torch.int8),
        "taken_ptr": None if taken is None else taken.view(torch.int8),
        "K": k, "same": units / k if policy == "uniform" else 1.0,
    }  # fmt: skip
    if units <= ONE_PROGRAM:
        held = triton.next_power_of_2(units)
        launch.launch(select_kernel, (1,), seed=seed, HELD=held, num_warps=WARPS, **draw, **out)
    else:
        select_by_several(draw, out, seed)
    return Selected(indices, weights, factors)


def _room_for_factors(weights: Tensor, dtype: torch.dtype) -> RowWeights:
    if dtype == torch.float16:
        return empty_scaled(weights)
    goal = dtype_of_factors(targets.current(weights.device), dtype)
    return RowWeights(
        weights if goal == weights.dtype else torch.empty_like(weights, dtype=goal), None
    )
