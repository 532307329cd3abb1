"""Scores of rows, s_m = ‖x_m‖·‖g_m‖, and the row memory's update that scores what it stores.

X is [M, N], G is [M, P]. A program owns a few rows and walks over the columns of X, then over those
of G, so that one launch and one pass over both leave complete scores. With a row memory the same
pass reads m, writes m ← c·σ·m + x in place and scores the result: two reads and a write.

A score that is not finite is stored as +Inf, so that the row gets selected and shows in the
gradient. The column sums of G (the bias gradient) can be taken from the same pass: each program
writes the sums of its own rows, [programs, P] in float32, which `sums.add_up` adds in one order.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from memaop_triton.kernels.gpu import launch
from memaop_triton.kernels.gpu.primitives import (
    round_to_bfloat16,
    row_keys,
    row_signs,
    value_of,
)
from memaop_triton.kernels.gpu.sums import ColumnSums, add_up
from memaop_triton.kernels.tuning import tuner
from memaop_triton.kernels.tuning.config import RowConfig, flags, problem_of
from memaop_triton.kernels.tuning.tuner import Call

#: For blocks of columns, which are not tuned. With 16 rows registers spill on sm_100.
TILE_OF_BLOCKS = RowConfig(block_m=8, block_c=64, num_warps=4)


@triton.jit
def store_column_sums(value, sums_ptr, columns, inside, count):
    """The program's line of column sums, [programs, count], for a tile of its rows."""
    place = tl.program_id(0).to(tl.int64) * count + columns
    tl.store(sums_ptr + place, tl.sum(value, axis=0), mask=inside)


@triton.jit
def _norms(
    a_ptr, a_row, a_col, rows, row_ok, count, sums_ptr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, SUMS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Norms of the program's rows of a matrix with `count` columns: [BLOCK_M] float32.

    Of every STEP columns BLOCK_C are read: all of them where these are equal.
    """
    squares = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    starts = a_ptr + rows.to(tl.int64) * a_row
    for first in range(0, count, STEP):
        columns = first + tl.arange(0, BLOCK_C)
        inside = columns < count
        places = starts[:, None] + columns[None, :].to(tl.int64) * a_col
        value = tl.load(places, mask=row_ok[:, None] & inside[None, :], other=0).to(tl.float32)
        squares += value * value
        if SUMS:
            store_column_sums(value, sums_ptr, columns, inside, count)
    return tl.sqrt(tl.sum(squares, axis=1))


@triton.jit
def _finite_or_inf(score):
    return tl.where(score < float("inf"), score, float("inf"))


@triton.jit(do_not_specialize=["M"])
def score_kernel(
    x_ptr, g_ptr, scores_ptr, sums_ptr,
    M, N, P, x_row, x_col, g_row, g_col,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, PAIR: tl.constexpr, SUMS: tl.constexpr,
    X_STEP: tl.constexpr, G_STEP: tl.constexpr,
):  # fmt: skip
    """scores[m] = ‖x_m‖·‖g_m‖, or ‖x_m‖ alone without PAIR."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < M
    score = _norms(
        x_ptr, x_row, x_col, rows, row_ok, N, sums_ptr, BLOCK_M, BLOCK_C, SUMS and not PAIR, X_STEP
    )
    if PAIR:
        score *= _norms(
            g_ptr, g_row, g_col, rows, row_ok, P, sums_ptr, BLOCK_M, BLOCK_C, SUMS, G_STEP
        )
    tl.store(scores_ptr + rows, _finite_or_inf(score), mask=row_ok)


@triton.jit
def _accumulate(
    m_ptr, a_ptr, m_row, a_row, a_col, rows, row_ok, read_ok, carried, factor, count, seed,
    sums_ptr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STREAM: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """m ← factor·m + a for the program's rows; the norms of what is stored."""
    squares = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    keys = row_keys(seed, rows, STREAM)
    slots = m_ptr + rows.to(tl.int64) * m_row
    starts = a_ptr + rows.to(tl.int64) * a_row
    for first in range(0, count, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        inside = columns < count
        mask = row_ok[:, None] & inside[None, :]
        places = starts[:, None] + columns[None, :].to(tl.int64) * a_col
        value = tl.load(places, mask=read_ok[:, None] & inside[None, :], other=0).to(tl.float32)
        if SUMS:
            store_column_sums(value, sums_ptr, columns, inside, count)
        # A slot that is empty may hold anything: it is not loaded.
        old = tl.load(
            slots[:, None] + columns[None, :], mask=carried[:, None] & inside[None, :], other=0
        )
        value += factor[:, None] * old.to(tl.float32)
        if m_ptr.dtype.element_ty == tl.bfloat16:
            stored = round_to_bfloat16(value, keys, columns)
        else:
            stored = value.to(m_ptr.dtype.element_ty)
        tl.store(slots[:, None] + columns[None, :], stored, mask=mask)
        squares += stored.to(tl.float32) * stored.to(tl.float32)
    return tl.sqrt(tl.sum(squares, axis=1))


@triton.jit
def row_factors(filled_ptr, carry, seed, rows, row_ok, SIGNED: tl.constexpr):
    """Which rows carry something over, and c·σ for each of `rows`."""
    carried = tl.load(filled_ptr + rows, mask=row_ok, other=0) != 0
    factor = value_of(carry) + tl.zeros(rows.shape, tl.float32)
    if SIGNED:
        factor *= row_signs(seed, rows)
    return carried, factor


@triton.jit(do_not_specialize=["M", "carry", "seed"])
def accumulate_kernel(
    mx_ptr, mg_ptr, x_ptr, g_ptr, filled_ptr, taken_ptr, carry, seed, scores_ptr, sums_ptr,
    poisoned_ptr, M, N, P, mx_row, mg_row, x_row, x_col, g_row, g_col,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, SIGNED: tl.constexpr, SUMS: tl.constexpr,
    SCORED: tl.constexpr,
):  # fmt: skip
    """Update the row memory, and mark the rows that hold a finite remainder as filled.

    With SCORED every row is updated and gets its score. Without, the rows marked in `taken` are
    emptied, because their outer products are computed elsewhere; and a row that is not finite puts
    NaN into all P elements of `poisoned`, because it reaches the gradient in no other way.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < M
    row_ok = inside
    if not SCORED:
        row_ok = inside & (tl.load(taken_ptr + rows, mask=inside, other=1) == 0)
    read_ok = inside if SUMS else row_ok  # the column sums need every row of G
    carried, factor = row_factors(filled_ptr, carry, seed, rows, row_ok, SIGNED)
    score = _accumulate(
        mx_ptr, x_ptr, mx_row, x_row, x_col, rows, row_ok, row_ok, carried, factor, N, seed,
        sums_ptr, BLOCK_M, BLOCK_C, 0, False,
    )  # fmt: skip
    score *= _accumulate(
        mg_ptr, g_ptr, mg_row, g_row, g_col, rows, row_ok, read_ok, carried, factor, P, seed,
        sums_ptr, BLOCK_M, BLOCK_C, 1, SUMS,
    )  # fmt: skip
    finite = score < float("inf")
    tl.store(filled_ptr + rows, (finite & row_ok).to(tl.int8), mask=inside)
    if SCORED:
        tl.store(scores_ptr + rows, _finite_or_inf(score), mask=inside)
    else:
        bad = tl.max((row_ok & (finite == 0)).to(tl.int32), axis=0)
        if bad != 0:
            nothing = tl.full((BLOCK_C,), float("nan"), tl.float32).to(
                poisoned_ptr.dtype.element_ty
            )
            for first in range(0, P, BLOCK_C):
                columns = first + tl.arange(0, BLOCK_C)
                tl.store(poisoned_ptr + columns, nothing, mask=columns < P)


def row_norms(a: Tensor, *, config: RowConfig | None = None) -> Tensor:
    """Euclidean norms of the rows of `a`, as `row_scores` takes it, float32 [M].

    +Inf for one that is not finite.
    """
    return _score(a, None, False, config)[0]


def row_scores(
    x: Tensor | None, g: Tensor, *, bias_grad: bool = False, config: RowConfig | None = None
) -> tuple[Tensor, ColumnSums | None]:
    """Scores of all rows in one launch, and the bias gradient from the same pass if wanted.

    Args:
        x: [M, N], float16, bfloat16 or float32, any strides; `None` for the norms of G alone.
            Blocks of columns, [M, blocks, columns], are equally far from each other, and their
            columns a power of two of at least 16.
        g: [M, P], likewise.
        bias_grad: Also sum the columns of G, which are not blocks then.
        config: Tile; chosen by `tuner` if `None`. With blocks it is as wide as a block.

    Returns:
        [M] float32, and the column sums of G in its dtype or `None`.
    """
    return _score(g, None, bias_grad, config) if x is None else _score(x, g, bias_grad, config)


def _score(
    x: Tensor, g: Tensor | None, bias_grad: bool, config: RowConfig | None
) -> tuple[Tensor, ColumnSums | None]:
    other = x if g is None else g
    blocks = [a for a in (x, other) if a.dim() == 3]
    if blocks:
        config = replace(config or TILE_OF_BLOCKS, block_c=blocks[0].shape[2])
    rows, columns = x.shape[0], _extent(x)
    if config is None:
        problem = problem_of(
            *("row_scores", x.dtype, rows, rows, columns, 0 if g is None else g.shape[1]),
            flags=flags(sums=bias_grad),
        )

        def run(config: RowConfig) -> None:
            add_up(None, _score(x, g, bias_grad, config)[1])

        config = tuner.choose(problem, x.device, lambda: run, RowConfig)
    scores = torch.empty(rows, dtype=torch.float32, device=x.device)
    sums = room_for_column_sums(other, config) if bias_grad else None
    launch.launch(
        score_kernel,
        (triton.cdiv(rows, config.block_m),),
        x_ptr=x, g_ptr=g, scores_ptr=scores, sums_ptr=None if sums is None else sums.lines,
        M=rows, N=columns, P=_extent(other),
        x_row=x.stride(0), x_col=x.stride(-1), g_row=other.stride(0), g_col=other.stride(-1),
        BLOCK_M=config.block_m, BLOCK_C=config.block_c,
        PAIR=g is not None, SUMS=bias_grad,
        X_STEP=_step(x, config.block_c), G_STEP=_step(other, config.block_c),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return scores, sums


def _step(a: Tensor, width: int) -> int:
    """Columns from the start of a tile of this width, or of a block, to that of the next."""
    # A gradient that is one number repeated has strides of 0.
    return a.stride(1) // a.stride(2) if a.dim() == 3 and a.stride(2) else width


def _extent(a: Tensor) -> int:
    """Columns from the first that is read to the last."""
    if a.dim() == 2:
        return a.shape[1]
    return (a.shape[1] - 1) * _step(a, a.shape[2]) + a.shape[2]


def accumulate_and_score(
    memory: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    g: Tensor,
    carry: float | Tensor,
    seed: int | Tensor,
    *,
    signed: bool = False,
    bias_grad: bool = False,
    config: RowConfig | None = None,
) -> tuple[Tensor, ColumnSums | None]:
    """m ← c·σ·m + x for X and G alike, in place, and the scores of what is stored; one launch.

    Args:
        memory: `(mx, mg, filled)`: [M, N] and [M, P] in float16, bfloat16 (rounded stochastically)
            or float32, rows of unit stride, and [M] bool. Slots that are not filled are not read.
            Afterwards the slots with finite rows are filled, the others are not.
        x: [M, N].
        g: [M, P], same dtype.
        carry: c, or a tensor of one element on the device.
        seed: Source of σ and of the rounding, or int64 [1] on the device.
        signed: Draw σ = ±1 for every row; 1 otherwise.
        bias_grad: Also sum the columns of G.
        config: Tile; chosen by `tuner` if `None`.

    Returns:
        [M] float32, and the column sums of G in its dtype or `None`.
    """
    scores = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    sums = _update(memory, x, g, carry, seed, scores, None, None, signed, bias_grad, config)
    return scores, sums


def accumulate_rest(
    memory: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    g: Tensor,
    carry: float | Tensor,
    seed: int | Tensor,
    taken: Tensor,
    poisoned: Tensor,
    *,
    signed: bool = False,
    bias_grad: bool = False,
    config: RowConfig | None = None,
) -> ColumnSums | None:
    """The same update for the rows not marked in `taken` ([M] bool); these are emptied.

    All of `poisoned` ([P], contiguous, of any floating dtype) is set to NaN if a row that is not
    finite and not taken was met, and left as it is otherwise. Nothing is scored.

    Returns:
        The column sums of all of G if `bias_grad`.
    """
    return _update(memory, x, g, carry, seed, None, taken, poisoned, signed, bias_grad, config)


def _update(
    memory: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    g: Tensor,
    carry: float | Tensor,
    seed: int | Tensor,
    scores: Tensor | None,
    taken: Tensor | None,
    poisoned: Tensor | None,
    signed: bool,
    bias_grad: bool,
    config: RowConfig | None,
) -> ColumnSums | None:
    """Launch the update that scores every row (`scores`), or that of the rest (`taken`)."""
    mx, mg, filled = memory
    if mx.stride(1) != 1 or mg.stride(1) != 1:
        raise ValueError("the rows of a memory must lie without gaps.")
    rows, n, p = *x.shape, g.shape[1]
    if config is None:
        problem = problem_of(
            *("accumulate_and_score", x.dtype, rows, rows, n, p),
            stored=mx.dtype,
            flags=flags(signed=signed, sums=bias_grad, unscored=taken is not None),
        )

        def make_benchmark_call() -> Call:
            # A memory as it is in the middle of training; c = 0, or it would grow without bounds.
            full = (_zeros_as(mx), _zeros_as(mg), torch.ones_like(filled))
            results = [None if t is None else torch.empty_like(t) for t in (scores, poisoned)]

            def run(config: RowConfig) -> None:
                operands = (full, x, g, 0.0, seed, results[0], taken, results[1])
                add_up(None, _update(*operands, signed, bias_grad, config))

            return run

        config = tuner.choose(problem, x.device, make_benchmark_call, RowConfig)
    sums = room_for_column_sums(g, config) if bias_grad else None
    launch.launch(
        accumulate_kernel,
        (triton.cdiv(rows, config.block_m),),
        mx_ptr=mx, mg_ptr=mg, x_ptr=x, g_ptr=g, filled_ptr=filled.view(torch.int8),
        taken_ptr=None if taken is None else taken.view(torch.int8),
        carry=carry, seed=seed, scores_ptr=scores, sums_ptr=None if sums is None else sums.lines,
        poisoned_ptr=poisoned,
        M=rows, N=n, P=p, mx_row=mx.stride(0), mg_row=mg.stride(0),
        x_row=x.stride(0), x_col=x.stride(1), g_row=g.stride(0), g_col=g.stride(1),
        BLOCK_M=config.block_m, BLOCK_C=config.block_c,
        SIGNED=signed, SUMS=bias_grad, SCORED=taken is None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return sums


def _zeros_as(m: Tensor) -> Tensor:
    """Zeros in the layout of `m`, gaps between rows included."""
    return torch.empty_strided(m.shape, m.stride(), dtype=m.dtype, device=m.device).zero_()


def room_for_column_sums(g: Tensor, config: RowConfig) -> ColumnSums:
    """Room for the column sums of `g`, a line of them for each program of a pass over rows."""
    programs = triton.cdiv(g.shape[0], config.block_m)
    lines = torch.empty((programs, g.shape[1]), dtype=torch.float32, device=g.device)
    return ColumnSums(lines, torch.empty(g.shape[1], dtype=g.dtype, device=g.device))
