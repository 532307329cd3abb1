"""Writes bench/results/predicted.md: how long GPUs that were not there should take.

python -m bench.microscope.predict

Every number comes from `kernels/tuning/cost_model.py`, and so from published rates. Nothing is
measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.microscope.report import table
from memaop_triton import MemAOPConfig
from memaop_triton.kernels.targets import TARGETS, Target
from memaop_triton.kernels.tuning import defaults
from memaop_triton.kernels.tuning.config import GemmConfig, Problem
from memaop_triton.kernels.tuning.cost_model import LAUNCH, UNHIDDEN, Cost, predict
from memaop_triton.selection import is_weighted, select_rows

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
- *select*: the policy's operations on M scores. *GEMM*: of the selected rows, gathered as they are
  loaded.
- *ratio*: dense over ours; above 1 ours is faster. *GEMM limited by*: what takes longest in it.
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
- A launch takes {launch:.0f} µs, whoever makes it, and so does every operation of a selection at
  least: in PyTorch {version} {operations}. Sorts and
  top-ks are several launches, which is not counted, and neither is time in which the CPU is behind.
  A CUDA graph removes most of both.
- The refresh of the subspace's basis also takes a QR factorisation of N x 16 numbers every eighth
  step. It runs in the vendor's solver, of which the model knows nothing; it is left out.
- Caches are empty before each kernel but for what one leaves to the next, as parts to add up.
"""
COMPARISON = """\
## Beside a count on paper

M = 16384, N = P = 4096, r = 1/8 on an {chip}. Counting only FLOPs of the GEMM at {tflops:.0f}
TFLOP/s and, one after the other, passes over X and G at {tbs:.1f} TB/s (one without a memory, three
with one) gives the first line, in milliseconds; the model gives the second.

{table}

The model is the slower one, for what a count on paper leaves out: the GEMM's last wave ({idle:.0%}
of its places are empty), what does not overlap, the first loads of every wave, and the selection,
whose operations take {select:.0f} µs here.

The residual GEMM (`randk`) was meant to save a pass: it forms its operands while loading. The model
says that this costs more than it saves. Every number is formed anew in {again:.0f} programs on
average, which takes {formed:.2f} ms, limited by {limit}; to update the memory of all rows, as with
`topk`, and to multiply what lies there is predicted to take {instead:.2f} ms less in all.
"""
LAYER = """\
## The whole layer

Forward and backward of `Linear` with bias, M x N to M x P, at r = 1/8. *dense* is three products.
*dW sampled* leaves dX exact; *both sampled* computes dX for the selected rows only.
"""


class _Counter(TorchDispatchMode):
    """Counts operations that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aliases = [value.alias_info for value in func._schema.returns]
        self.count += not any(alias is not None and not alias.is_write for alias in aliases)
        return func(*args, **(kwargs or {}))


def pytorch() -> str:
    """The release that is installed, of whatever build."""
    return torch.__version__.partition("+")[0]


def version_of_page() -> str:
    """The PyTorch whose operations the page has counted."""
    return re.findall(r"in PyTorch (\S+)", PAGE.read_text(encoding="utf-8"))[0]


def operations(policy: str) -> int:
    """Number of PyTorch operations in one selection."""
    scores = torch.ones(64, 2)[:, 0]  # with gaps: as on a GPU, the C code does not take them
    with _Counter() as counter:
        select_rows(scores, 8, policy)
    return counter.count


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


def weight_grad(
    target: Target,
    shape: tuple[int, int, int],
    config: MemAOPConfig,
    *,
    bias: bool = False,
    selected: bool = False,
) -> Prediction:
    """One dW call, launch by launch as `memaop_triton/backward/steps_triton.py` makes them.

    Args:
        target: Whose chip.
        shape: M, N and P.
        config: The setting.
        bias: Take the bias gradient from the same passes.
        selected: The rows were selected before, for dX.
    """
    m, n, p = shape
    k = config.num_rows(m)
    parts = dict.fromkeys(PARTS, 0.0)
    weights = ("weighted",) if is_weighted(config.selection) else ()
    sums = ("sums",) if bias else ()

    def cost(kernel: str, rows: int, columns: int, others: int = 0, **rest: Any) -> float:
        return shipped(Problem(kernel, DTYPE, m, rows, columns, others, **rest), target).seconds

    rank = 0
    if not selected:
        parts["select"] = LAUNCH * operations(config.selection)
    gemm = Problem("gather_gemm", DTYPE, m, k, n, p, flags=weights)
    if config.row_memory is not None:
        if config.selection == "randk":
            flags = (*sums, "unscored")
            parts["memory"] = cost("accumulate_and_score", k, n, p, stored=DTYPE, flags=flags)
            gemm = Problem("residual_gemm", DTYPE, m, k, n, p, stored=DTYPE)
        else:
            parts["memory"] = cost("accumulate_and_score", m, n, p, stored=DTYPE, flags=sums)
        parts["memory"] += 2 * LAUNCH  # the carry, and the flags of the selected rows
    elif config.subspace is not None:
        rank = config.rank_for(m, n, p)
        flags = ("norms", *sums)
        parts["subspace"] = (
            cost("project", m, n, rank=rank)
            + cost("transposed_mm", m, p, rank=rank, flags=flags)
            + cost("gather_gemm", k, rank, p, flags=weights)
            + LAUNCH  # the sum that leaves the correction
            + cost("transposed_mm", m, n, rank=rank) / config.period
        )
        gemm = Problem("gather_gemm", DTYPE, m, k, n, p, rank=rank, flags=weights)
    elif not selected:
        parts["score"] = cost("row_scores", m, n, p, flags=sums)
    elif bias:
        parts["score"] = LAUNCH + 2 * m * p / target.chip.memory_rate
    found = shipped(gemm, target)
    parts["GEMM"] = found.seconds
    return Prediction(parts, found.limited_by)


def layer(
    target: Target, shape: tuple[int, int, int], config: MemAOPConfig
) -> tuple[float, float, float]:
    """Seconds of forward and backward: dense, with dW sampled, with both sampled."""
    m, n, p = shape
    k, chip = config.num_rows(m), target.chip
    product = dense_product(target, m, n, p)
    bias = LAUNCH + 2 * m * p / chip.memory_rate
    whole = 3 * product + bias
    one = 2 * product + weight_grad(target, shape, config, bias=True).seconds

    def pass_over(columns: int) -> float:
        return shipped(Problem("row_scores", DTYPE, m, m, columns, 0), target).seconds

    # Rows of G gathered and weighted; their product; zeros, and the product's rows added to them.
    moved = 2 * (4 * k * p + m * n + 3 * k * n)
    scores = pass_over(p) + (pass_over(n) if config.memory is None else 0.0)
    both = (
        product
        + scores
        + LAUNCH * operations(config.selection)
        + (4 * LAUNCH + moved / chip.memory_rate)
        + dense_product(target, k, n, p)
        + weight_grad(target, shape, config, bias=True, selected=True).seconds
    )
    return whole, one, both


def page() -> str:
    """The whole page."""
    targets = (TARGETS["sm_90"], TARGETS["gfx942"])
    lines = [INTRODUCTION]
    for target in targets:
        lines += [f"## PREDICTED: {target.chip.name}, dW alone\n", _calls(target), ""]
    lines.append(LAYER)
    for target in targets:
        lines += [f"### PREDICTED: {target.chip.name}, a layer\n", _layers(target), ""]
    lines += [_comparison(targets[0]), _assumptions(targets)]
    return "\n".join(lines)


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


def _layers(target: Target) -> str:
    head = ("PREDICTED, M x N x P", "setting", "dense")
    head = (*head, "dW sampled", "ratio", "both sampled", "ratio")
    some = {name: s for name, s in SETTINGS.items() if MemAOPConfig(**s).is_unbiased}

    def body() -> Iterator[tuple[str, ...]]:
        for shape in SHAPES:
            for name, setting in some.items():
                whole, one, both = layer(target, shape, MemAOPConfig(ratio=1 / 8, **setting))
                size = " x ".join(map(str, shape))
                ratios = [f"{whole / one:.2f}", f"{whole / both:.2f}"]
                yield size, name, _micro(whole), _micro(one), ratios[0], _micro(both), ratios[1]

    return table(head, body())


def _comparison(target: Target) -> str:
    shape, chip = SHAPES[0], target.chip
    m, n, p = shape
    gemm = 2.0 * m * n * p / 8 / chip.flops("half")
    once = 2 * m * (n + p) / chip.memory_rate
    counted = (8 * gemm, gemm + once, gemm + 3 * once)
    plain, topk, randk, _ = (
        weight_grad(target, shape, MemAOPConfig(ratio=1 / 8, **s)) for s in SETTINGS.values()
    )
    modelled = (dense_product(target, *shape), plain.seconds, topk.seconds)
    problem = Problem("gather_gemm", DTYPE, m, m // 8, n, p, flags=("weighted",))
    idle = shipped(problem, target).idle
    formed = Problem("residual_gemm", DTYPE, m, m // 8, n, p, stored=DTYPE)
    tile = defaults.heuristic(formed, target)
    assert isinstance(tile, GemmConfig)
    return COMPARISON.format(
        chip=chip.name,
        tflops=chip.flops("half") / 1e12,
        tbs=chip.memory_rate / 1e12,
        table=table(
            ("PREDICTED", "dense", "no memory", "`residual`, `topk`"),
            [
                ("on paper", *(f"{1e3 * s:.2f}" for s in counted)),
                ("by the model", *(f"{1e3 * s:.2f}" for s in modelled)),
            ],
        ),
        idle=idle,
        select=1e6 * plain.parts["select"],
        again=(n / tile.block_n * p + p / tile.block_p * n) / (n + p),
        formed=1e3 * randk.parts["GEMM"],
        limit=randk.limited_by,
        instead=1e3 * (randk.seconds - topk.seconds),
    )


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
    counts = ", ".join(f"{operations(p)} for `{p}`" for p in ("priority", "topk", "randk"))
    return ASSUMPTIONS.format(
        rates=rates,
        unhidden=UNHIDDEN,
        launch=1e6 * LAUNCH,
        operations=counts,
        version=pytorch(),
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
