"""Selection among many units, shared by programs: what `select.py` does, in six launches.

The (K+1)-th largest key is found digit by digit, 8 bits at a time, from a histogram of the keys
that agree in the digits before. Programs cannot wait for one another within a launch. So each
stores what it counted, and those of the next launch add it up, each for itself.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memaop_triton.kernels.gpu import launch
from memaop_triton.kernels.gpu.row_weights import RowWeights, store_float16
from memaop_triton.kernels.gpu.selection_keys import (
    count_digits,
    descend,
    draw_chunk,
    places_of,
    store_units,
    unit_scores,
    weights_of,
)

SHARE = 8192  # units of a program
CHUNK = 2048  # that it holds at a time


@triton.jit
def _sum_counts(counts_ptr, programs):
    """[256] from those of all programs, [programs, 256]."""
    line = tl.arange(0, 4)[:, None]
    total = tl.zeros((4, 256), tl.int32)
    for first in range(0, programs, 4):
        places = counts_ptr + (first + line) * 256 + tl.arange(0, 256)[None, :]
        total += tl.load(places, mask=first + line < programs, other=0)
    return tl.sum(total, 0)


@triton.jit
def _known_digits(counts_ptr, state_ptr, programs, units, K, DIGIT: tl.constexpr):
    """`descend` after the first DIGIT digits, from the counts of the last of them."""
    prefix, wanted = 0, tl.minimum(K + 1, units)
    if DIGIT > 1:
        prefix = tl.load(state_ptr + 2 * DIGIT - 2)
        wanted = tl.load(state_ptr + 2 * DIGIT - 1)
    counts = _sum_counts(counts_ptr + (DIGIT - 1) * programs * 256, programs)
    return descend(counts, prefix, wanted)


@triton.jit(do_not_specialize=["M", "units", "seed"])
def draw_kernel(
    scores_ptr, keys_ptr, slope_ptr, counts_ptr, drawn_ptr, seed, M, units,
    POLICY: tl.constexpr, BLOCK_ROWS: tl.constexpr, CHUNK: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Keys of the program's units, and the counts of their first digit."""
    slope = 1.0
    if POLICY == "bernoulli":
        slope = tl.load(slope_ptr)
    program = tl.program_id(0)
    counts = tl.zeros((256,), tl.int32)
    drawn = 0
    for offset in range(0, SHARE, CHUNK):
        keys, inside = draw_chunk(
            scores_ptr, keys_ptr, seed, program * SHARE + offset, slope, units, M,
            POLICY, BLOCK_ROWS, CHUNK,
        )  # fmt: skip
        counts += count_digits(keys, inside, 0, 24)
        drawn += tl.sum((inside & (keys > 0)).to(tl.int32), 0)
    tl.store(counts_ptr + program * 256 + tl.arange(0, 256), counts)
    tl.store(drawn_ptr + program, drawn)


@triton.jit(do_not_specialize=["programs", "units", "K"])
def digit_kernel(
    keys_ptr, counts_ptr, state_ptr, programs, units, K,
    DIGIT: tl.constexpr, CHUNK: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Counts of digit DIGIT (from 0) of the keys that have the threshold's digits before it."""
    program = tl.program_id(0)
    prefix, wanted = _known_digits(counts_ptr, state_ptr, programs, units, K, DIGIT)
    if program == 0:
        tl.store(state_ptr + 2 * DIGIT, prefix)
        tl.store(state_ptr + 2 * DIGIT + 1, wanted)
    counts = tl.zeros((256,), tl.int32)
    for offset in range(0, SHARE, CHUNK):
        each = program * SHARE + offset + tl.arange(0, CHUNK)
        inside = each < units
        keys = tl.load(keys_ptr + each, mask=inside, other=0)
        counts += count_digits(keys, inside, prefix, 24 - 8 * DIGIT)
    place = (DIGIT * programs + program) * 256
    tl.store(counts_ptr + place + tl.arange(0, 256), counts)


@triton.jit(do_not_specialize=["programs", "units", "K"])
def count_kernel(
    keys_ptr, counts_ptr, state_ptr, totals_ptr, programs, units, K,
    CHUNK: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Numbers of keys above and at the threshold among the program's."""
    program = tl.program_id(0)
    threshold, wanted = _known_digits(counts_ptr, state_ptr, programs, units, K, 4)
    if program == 0:
        tl.store(state_ptr + 8, threshold)
        tl.store(state_ptr + 9, wanted)
    above, equal = 0, 0
    for offset in range(0, SHARE, CHUNK):
        each = program * SHARE + offset + tl.arange(0, CHUNK)
        keys = tl.load(keys_ptr + each, mask=each < units, other=-1)
        above += tl.sum((keys > threshold).to(tl.int32), 0)
        equal += tl.sum((keys == threshold).to(tl.int32), 0)
    tl.store(totals_ptr + program, above)
    tl.store(totals_ptr + programs + program, equal)


@triton.jit(do_not_specialize=["M", "programs", "units", "K", "same"])
def compact_kernel(
    scores_ptr, keys_ptr, slope_ptr, indices_ptr, weights_ptr, factors_ptr, filled_ptr, taken_ptr,
    state_ptr, totals_ptr, drawn_ptr, M, programs, units, K, same,
    POLICY: tl.constexpr, BLOCK_ROWS: tl.constexpr, CHUNK: tl.constexpr, SHARE: tl.constexpr,
    MOST_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The program's taken units, stored behind those of the programs before."""
    program = tl.program_id(0)
    others = tl.arange(0, MOST_PROGRAMS)
    above = tl.sum(tl.load(totals_ptr + others, mask=others < program, other=0), 0)
    equal = tl.sum(tl.load(totals_ptr + programs + others, mask=others < program, other=0), 0)
    prefix = tl.load(state_ptr + 8)
    quota = K - (tl.minimum(K + 1, units) - tl.load(state_ptr + 9))
    threshold = prefix.to(tl.float32, bitcast=True)
    slope, surplus = 1.0, 1.0
    if POLICY == "bernoulli":
        slope = tl.load(slope_ptr)
        drawn = tl.sum(tl.load(drawn_ptr + others, mask=others < programs, other=0), 0)
        surplus = tl.maximum(tl.div_rn(drawn * 1.0, K * 1.0), 1)
    for offset in range(0, SHARE, CHUNK):
        each = program * SHARE + offset + tl.arange(0, CHUNK)
        inside = each < units
        keys = tl.load(keys_ptr + each, mask=inside, other=-1)
        score = unit_scores(scores_ptr, each, inside, M, BLOCK_ROWS)
        place, taken, more_above, more_equal = places_of(keys, prefix, above, equal, quota)
        weight = weights_of(score, keys, threshold, slope, surplus, same, POLICY)
        store_units(
            each, inside, place, taken, weight, M, indices_ptr, weights_ptr, factors_ptr,
            filled_ptr, taken_ptr, BLOCK_ROWS,
        )  # fmt: skip
        above += more_above
        equal += more_equal


def select_by_several(draw: dict[str, Any], out: dict[str, Any], seed: int | Tensor) -> None:
    """The six launches for many units, and a seventh for float16 factors."""
    units, device = draw["units"], draw["keys_ptr"].device
    scale, factors = out.pop("scale_ptr"), out["factors_ptr"]
    if scale is not None:
        out["factors_ptr"] = None
    programs = triton.cdiv(units, SHARE)
    grid, several = (programs,), {"SHARE": SHARE, "num_warps": 8}
    counts = torch.empty((4, programs, 256), dtype=torch.int32, device=device)
    state = torch.empty((5, 2), dtype=torch.int32, device=device)
    totals = torch.empty((2, programs), dtype=torch.int32, device=device)
    drawn = torch.empty(programs, dtype=torch.int32, device=device)
    launch.launch(
        draw_kernel, grid, counts_ptr=counts, drawn_ptr=drawn, seed=seed, **draw, **several
    )
    search: dict[str, Any] = {
        "keys_ptr": draw["keys_ptr"], "counts_ptr": counts, "state_ptr": state,
        "programs": programs, "units": units, "K": out["K"], "CHUNK": draw["CHUNK"], **several,
    }  # fmt: skip
    for digit in range(1, 4):
        launch.launch(digit_kernel, grid, DIGIT=digit, **search)
    launch.launch(count_kernel, grid, totals_ptr=totals, **search)
    launch.launch(
        compact_kernel, grid, state_ptr=state, totals_ptr=totals, drawn_ptr=drawn,
        programs=programs, MOST_PROGRAMS=triton.next_power_of_2(programs),
        **draw, **out, **several,
    )  # fmt: skip
    if scale is not None:
        store_float16(RowWeights(factors, scale), out["weights_ptr"])


def chunk_of(units: int, block_rows: int, policy: str) -> int:
    """Units that a program holds at a time; what compiles without spills.

    For `bernoulli` half as many as for others, and 64 at least, whatever there are.
    """
    most = CHUNK // 2 if policy == "bernoulli" else CHUNK
    enough: int = triton.next_power_of_2(units)
    return max(64, min(most // min(block_rows, 16), enough))
