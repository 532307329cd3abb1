"""Writes bench/results/predicted.md: how long GPUs that were not there should take.

python -m bench.microscope.predict

Every number comes from `kernels/tuning/cost_model.py`, and so from published rates. Nothing is
measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.microscope.report import table
from memaop_triton import MemAOPConfig
from memaop_triton.kernels.gpu import select, stash, stash_restore
from memaop_triton.kernels.targets import TARGETS, Target
from memaop_triton.kernels.tuning import defaults
from memaop_triton.kernels.tuning.config import Problem
from memaop_triton.kernels.tuning.cost_model import LAUNCH, SCHEDULERS, UNHIDDEN, Cost, predict
from memaop_triton.sampling.selection import is_weighted

PAGE = Path(__file__).parents[1] / "results" / "predicted.md"
SHAPES = [(16384, 4096, 4096), (16384, 1024, 1024), (8192, 4096, 11008), (4096, 768, 3072)]
INVERSE_RATIOS = (8, 16)
SETTINGS: dict[str, dict[str, Any]] = {
    "no memory, `priority`": {"selection": "priority", "memory": "none"},
    "`residual`, `topk`": {"selection": "topk", "memory": "residual"},
    "`residual`, `randk`": {"selection": "randk", "memory": "residual"},
    "the default: `subspace`, `priority`": {},
}
DTYPE = torch.bfloat16
# Instructions that a warp of the selection kernel issues for each key of its threads, counted in
# the code for sm_90: to draw, 31 times to compare and add, and to store what is taken.
SELECTION = {"priority": 44 + 31 * 4.2 + 93, "topk": 9 + 31 * 4.2 + 64, "randk": 29 + 31 * 4.2 + 65}
# Instructions that a warp of the stash's kernels issues for a tile of its program's rows and 64
# columns of bfloat16 in 4 bits, by target: to round them without a subspace and beside one of 16
# dimensions, and to restore them. A test compares them with the compiled loops.
ROUNDING = {"sm_90": (1052, 1451, 949), "gfx942": (895, 1251, 722)}
PARTS = ("score", "memory", "subspace", "select", "GEMM")
INTRODUCTION = """\
# PREDICTED times on GPUs

**Nothing on this page was measured on a GPU.** Written by `python -m bench.microscope.predict` from
the analytic model in `kernels/tuning/cost_model.py`, which starts from the vendors' rates; a test
compares the page with the code. It says what to expect and what limits what; the first measurement
replaces it.

All in bfloat16, in microseconds. *dense* is Gᵀ X by the vendor's library.

- *score*: the norms of all rows. *memory*: the update of the row memory, scores included.
- *subspace*: Z = XQ, GᵀZ with the scores, the correction, and an eighth of XᵀZ.
- *select*: one program that draws, finds the K largest of M keys and stores their rows in order.
  *GEMM*: of the selected rows, gathered as they are loaded.
- *ratio*: dense over ours; above 1 ours is faster. *GEMM limited by*: what takes longest in it.

Layers 1024 wide are predicted to lose on an H100 still. Their dense product takes as long as the
pass that scores all rows and the one program that selects: 30 and 22 µs at 16384 rows, which more
processors or fewer columns do not shorten. On a chip that multiplies slower, or at twice the width,
they are small beside it.

`randk` needs no scores, so it does not store the sums of selected rows in the memory: it packs them
side by side, for the vendor's GEMM.
"""
GATHERED = """\
## PREDICTED: rows gathered by the GEMM, or packed before it

Rows that lie in memory as they are multiplied (no memory, a subspace, a row memory whose sums were
scored) are gathered while the GEMM loads them. That is what this compares with copies side by side
and the vendor's GEMM at the rate of large products, which a product of few rows does not reach.
"""
STASHES = """\
## PREDICTED: inputs in four bits

A layer with `stash="int4"`, in microseconds, `priority` at r = 1/8.

- *round*: all rows in the forward pass, beside a subspace with Z.
- *score*, *select*: as above, but norms of X are stored already, and Z too, so only G is read; with
  a refresh of the subspace as above.
- *restore*: the selected rows of X, and those of G, gathered and weighted.
- *GEMM*: the vendor's, with the part inside of the subspace.
- *layer*: its three products, dW sampled, without a stash and with one; *of it*: the second over
  the first.
"""
ASSUMPTIONS = """\
## What is assumed

- The rates are parts of the peaks that large products and long copies reach in practice (sources in
  `kernels/targets.py`), at the clock for which the vendor counts its peaks:

{rates}

- Dense products run at these rates without tails or start-up, apart from one launch: that favours
  dense.
- Ours runs the tile that `defaults.heuristic` ships. Where several units of a chip work at once,
  the longest takes its time and a tenth ({unhidden:.0%}) of the others' is added.
- A launch takes {launch:.0f} µs, whoever makes it. Time in which the CPU is behind is not counted.
  A CUDA graph removes most of both.
- One program selects, on one processor of the chip: its time is the instructions that its warps
  issue. The seed of its draws comes from the host, with its arguments.
- The refresh of the subspace's basis also makes the columns of N x 16 numbers orthonormal every
  eighth step, in five launches, of which the model counts the launches.
- Caches are empty before each kernel but for what one leaves to the next, as parts to add up.
"""


def selection(policy: str, rows: int, target: Target) -> float:
    """Seconds of the selection kernel, which is one program up to `select.ONE_PROGRAM` rows."""
    assert rows <= select.ONE_PROGRAM
    keys = rows / (select.WARPS * target.warp_size)  # of each thread
    cycles = keys * SELECTION[policy] * select.WARPS / SCHEDULERS
    return LAUNCH + cycles / (1e9 * target.chip.clock)


@dataclass(frozen=True)
class Prediction:
    """One call, by parts, in seconds."""

    parts: dict[str, float]
    limited_by: str

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def dense_product(target: Target, m: int, n: int, p: int) -> float:
    """Seconds of any of the three products of a layer, by the vendor's library."""
    chip, numbers = target.chip, m * n + m * p + n * p
    return LAUNCH + max(2.0 * m * n * p / chip.flops("half"), 2 * numbers / chip.memory_rate)


def shipped(problem: Problem, target: Target) -> Cost:
    """The prediction for what the heuristic launches."""
    return predict(problem, defaults.heuristic(problem, target), target)


def weight_grad(target: Target, shape: tuple[int, int, int], config: MemAOPConfig) -> Prediction:
    """One dW of the shape (M, N, P), launch by launch as `backward/steps_triton.py` makes them."""
    m, n, p = shape
    k = config.num_rows(m)
    parts = dict.fromkeys(PARTS, 0.0)
    weights = ("weighted",) if is_weighted(config.selection) else ()

    def cost(kernel: str, rows: int, columns: int, others: int = 0, **rest: Any) -> float:
        return shipped(Problem(kernel, DTYPE, m, rows, columns, others, **rest), target).seconds

    parts["select"] = selection(config.selection, m, target)
    gemm = Problem("gather_gemm", DTYPE, m, k, n, p, flags=weights)
    if config.selection == "randk" and config.row_memory is not None:
        rest = ("unscored",)
        parts["memory"] = cost("accumulate_and_score", k, n, p, stored=DTYPE, flags=rest)
        parts["GEMM"] = pack(target, k, n, p, operands=2) + dense_product(target, k, n, p)
        return Prediction(parts, "the vendor's GEMM")
    if config.row_memory is not None:
        parts["memory"] = cost("accumulate_and_score", m, n, p, stored=DTYPE)
    elif config.subspace is not None:
        rank = config.rank_for(m, n, p)
        parts["subspace"] = (
            cost("project", m, n, rank=rank)
            + cost("transposed_mm", m, p, rank=rank, flags=("norms",))
            + cost("gather_gemm", k, rank, p, flags=weights)
            + LAUNCH  # the sum that leaves the correction
            + (cost("transposed_mm", m, n, rank=rank) + 5 * LAUNCH) / config.period
        )
        gemm = Problem("gather_gemm", DTYPE, m, k, n, p, rank=rank, flags=weights)
    else:
        parts["score"] = cost("row_scores", m, n, p)
    found = shipped(gemm, target)
    parts["GEMM"] = found.seconds
    return Prediction(parts, found.limited_by)


def pack(target: Target, k: int, n: int, p: int, operands: int = 1) -> float:
    """Seconds to write K rows of X and G side by side, each the sum of so many that are read."""
    moved = (operands + 1) * k * (n + p) * DTYPE.itemsize
    return LAUNCH + moved / target.chip.memory_rate


@dataclass(frozen=True)
class Stashed:
    """What a sampled layer with a stash takes, by parts, in seconds."""

    round: float
    score: float
    select: float
    restore: float
    product: float

    @property
    def seconds(self) -> float:
        """All of it: what the forward pass takes more, and dW."""
        return self.round + self.score + self.select + self.restore + self.product


def stashed(target: Target, shape: tuple[int, int, int], config: MemAOPConfig) -> Stashed:
    """The shape (M, N, P), launch by launch as `backward/steps_stash.py` makes them."""
    (m, n, p), size = shape, DTYPE.itemsize
    k, chip = config.num_rows(m), target.chip
    rank = 0 if config.subspace is None else config.rank_for(m, n, p)
    plain, beside, restoring = ROUNDING[target.name]
    stored = n / 2 + 2 * n / 64
    # Z takes a pass over X of its own.
    read = (2 if rank else 1) * n * size
    rounding = _by_programs(
        target, m / stash.ROWS, n, beside if rank else plain, stash.WARPS, m * (read + stored)
    )
    restoring_x = _by_programs(
        target,
        k / stash_restore.ROWS,
        n,
        restoring,
        stash_restore.WARPS,
        k * (stored + n * size + 2 * p * size),
    )
    product = dense_product(target, k, n, p)
    if rank:
        problem = Problem("transposed_mm", DTYPE, m, m, p, 0, rank=rank, flags=("norms",))
        refresh = shipped(replace(problem, n=n, flags=()), target).seconds + 5 * LAUNCH
        score = shipped(problem, target).seconds + refresh / config.period
        product += 2 * LAUNCH + 2.0 * rank * n * p / chip.flops("half")
    else:
        score = LAUNCH + m * p * size / chip.memory_rate
    chosen = selection(config.selection, m, target)
    return Stashed(rounding, score, chosen, restoring_x, product)


def _by_programs(
    target: Target, programs: float, columns: int, instructions: float, warps: int, moved: float
) -> float:
    """Seconds of a launch whose programs issue so many instructions for every 64 columns."""
    issued = programs * columns / 64 * instructions * warps
    busy = issued / (SCHEDULERS * target.processors * 1e9 * target.chip.clock)
    times = sorted((busy, moved / target.chip.memory_rate))
    return LAUNCH + times[1] + UNHIDDEN * times[0]


def page() -> str:
    """The whole page."""
    targets = (TARGETS["sm_90"], TARGETS["gfx942"])
    lines = [INTRODUCTION]
    for target in targets:
        lines += [f"## PREDICTED: {target.chip.name}, dW alone\n", _calls(target), ""]
    lines += [GATHERED, _gathered(targets), "", STASHES, _stashes(targets), ""]
    return "\n".join([*lines, _assumptions(targets)])


def _gathered(targets: tuple[Target, ...]) -> str:
    head = ("PREDICTED, K x N x P", "chip", "gathered", "packed, then the vendor's")

    def body() -> Iterator[tuple[str, ...]]:
        for target in targets:
            for width in (1024, 2048, 4096):
                for inverse in (16, 8, 4):
                    k = 16384 // inverse
                    flags = ("weighted",)
                    gemm = Problem("gather_gemm", DTYPE, 16384, k, width, width, flags=flags)
                    plain = pack(target, k, width, width) + dense_product(target, k, width, width)
                    shape = f"{k} x {width} x {width}"
                    times = shipped(gemm, target).seconds, plain
                    yield shape, target.chip.name, *map(_micro, times)

    return table(head, body())


def _stashes(targets: tuple[Target, ...]) -> str:
    head = ("PREDICTED, M x N x P", "chip", "setting", "round", "score", "select", "restore")
    head = (*head, "GEMM", "layer", "with a stash", "of it")

    def body() -> Iterator[tuple[str, ...]]:
        for target in targets:
            for shape in SHAPES:
                exact = 2 * dense_product(target, *shape)
                for memory in ("none", "subspace"):
                    config = MemAOPConfig(ratio=1 / 8, memory=memory, stash="int4")
                    ours = stashed(target, shape, config)
                    parts = ours.round, ours.score, ours.select, ours.restore, ours.product
                    without = exact + weight_grad(target, shape, config).seconds
                    beside = exact + ours.seconds
                    yield (
                        " x ".join(map(str, shape)),
                        target.chip.name,
                        f"`{memory}`",
                        *map(_micro, (*parts, without, beside)),
                        f"{beside / without:.2f}",
                    )

    return table(head, body())


def _calls(target: Target) -> str:
    head = ("PREDICTED, M x N x P", "r", "setting", "dense")
    head = (*head, *PARTS, "ours", "ratio", "GEMM limited by")

    def body() -> Iterator[tuple[str, ...]]:
        for shape in SHAPES:
            whole = dense_product(target, *shape)
            for inverse in INVERSE_RATIOS:
                for name, setting in SETTINGS.items():
                    config = MemAOPConfig(ratio=1 / inverse, **setting)
                    ours = weight_grad(target, shape, config)
                    yield (
                        " x ".join(map(str, shape)),
                        f"1/{inverse}",
                        name,
                        _micro(whole),
                        *(_micro(ours.parts[part]) if ours.parts[part] else "" for part in PARTS),
                        _micro(ours.seconds),
                        f"{whole / ours.seconds:.2f}",
                        ours.limited_by,
                    )

    return table(head, body())


def _assumptions(targets: tuple[Target, ...]) -> str:
    rates = table(
        ("chip", "TFLOP/s", "of", "TB/s from memory", "of", "TB/s from its cache", "of"),
        [
            (
                chip.name,
                f"{chip.flops('half') / 1e12:.0f}",
                f"{chip.half:.0f}",
                f"{chip.memory_rate / 1e12:.1f}",
                f"{chip.bandwidth:.2f}",
                f"{chip.cache_rate / 1e12:.1f}",
                f"{chip.cache_bandwidth:.1f}",
            )
            for chip in (target.chip for target in targets)
        ],
    )
    return ASSUMPTIONS.format(
        rates=rates,
        unhidden=UNHIDDEN,
        launch=1e6 * LAUNCH,
    )


def _micro(seconds: float) -> str:
    return f"{1e6 * seconds:.0f}"


def main() -> None:
    """Write the page."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
