"""What scores that read less of the rows cost in variance, and what they save in time.

Rows are captured from networks that were trained for a while. Drawn by the scores s' with
probabilities p, Σp = K, the weight gradient has the variance Σ s² (1/p − 1), s being the norms of
whole rows. Beside it the time of the whole call: measured on this CPU, and predicted for GPUs from
`kernels/tuning/cost_model.py`, where nothing was measured.
"""

from __future__ import annotations

import importlib
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memaop_triton import MemAOPConfig
from memaop_triton.backward.scores import misses_columns, parts_to_score, with_floor
from memaop_triton.backward.weight_grad import weight_and_bias_grad
from memaop_triton.bench.machine import here
from memaop_triton.bench.studies.quality import data
from memaop_triton.bench.studies.quality.capture import Rows, capture
from memaop_triton.bench.studies.quality.schemes import value_of
from memaop_triton.bench.studies.quality.tasks import TASKS
from memaop_triton.config import SCORES
from memaop_triton.dispatch import row_norms
from memaop_triton.flops import columns_read, numbers_read
from memaop_triton.kernels.targets import TARGETS, Target
from memaop_triton.kernels.tuning.cache import replace_file
from memaop_triton.kernels.tuning.config import Problem
from memaop_triton.kernels.tuning.cost_model import LAUNCH, predict
from memaop_triton.kernels.tuning.defaults import heuristic
from memaop_triton.sampling.selection import inclusion_probabilities

#: Whose rows, and the steps that each network is trained for before.
STEPS = {"fashion": 100, "vit": 100, "gpt-512": 50, "minilm": 25}
RATIOS = ("1/8", "1/16")
CPU_SHAPES = ((8192, 1024, 1024), (4096, 2048, 2048))
GPU_SHAPES = ((16384, 4096, 4096), (16384, 1024, 1024))
_BATCHES = 2
_PLACES = 8  # of the columns, for every batch
# Operations on all scores that raise them above zero, each a launch.
_FLOOR_LAUNCHES = 4


class Variance(NamedTuple):
    """The mean over the layers of one kind of a task, or over all its layers ("all").

    Attributes:
        task: Whose network.
        kind: The last part of the layers' names.
        layers: How many.
        ratio: K/M, as in `"1/8"`.
        scores: One of `SCORES`.
        added: Variance of dW by the draws over ‖dW‖².
        over_norms: That, over the one of `"norms"`.
    """

    task: str
    kind: str
    layers: int
    ratio: str
    scores: str
    added: float
    over_norms: float


class Time(NamedTuple):
    """One weight gradient without a memory, by `priority`, whole call and no bias.

    Attributes:
        device: The processor, or the GPU that it is predicted for.
        shape: M, N and P, as in `"8192 x 1024 x 1024"`.
        ratio: K/M, as in `"1/8"`.
        scores: One of `SCORES`.
        milliseconds: Median, or predicted.
        over_norms: Median of this time over that of `"norms"` in the same round, or the ratio.
        megabytes: That the scores read.
    """

    device: str
    shape: str
    ratio: str
    scores: str
    milliseconds: float
    over_norms: float
    megabytes: float


def scores_of(kind: str, rows: Rows, generator: torch.Generator | None = None) -> Tensor:
    """Those that the library draws by, [M]."""
    x, g = parts_to_score(kind, *rows, generator)
    scores = row_norms(g) if x is None else row_norms(x) * row_norms(g)
    is_partial = misses_columns(kind, rows.x.shape[1], rows.g.shape[1])
    return with_floor(scores) if is_partial else scores


def added_variance(rows: Rows, scores: Tensor, k: int) -> float:
    """Of dW, drawn by any scores ([M]), over ‖dW‖²."""
    squares = (row_norms(rows.x).double() * row_norms(rows.g).double()).square()
    p = inclusion_probabilities(scores, k).double()
    lost = torch.where(squares > 0, squares * (1 / p - 1), 0).sum()
    return float(lost / (rows.g.t() @ rows.x).double().square().sum())


def variances(name: str, data_dir: Path | None) -> list[Variance]:
    """All kinds of layers of a task at all ratios."""
    task = TASKS[name].located(data_dir)
    source = data.load(task, data_dir)
    generator = torch.Generator().manual_seed(0)
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    captured = capture(task, source, STEPS[name], _BATCHES)
    for layer, batches in captured.items():
        for ratio in RATIOS:
            for scores in SCORES:
                mean = _mean_variance(batches, scores, value_of(ratio), generator)
                found[layer.rpartition(".")[2], ratio, scores].append(mean)
                found["all", ratio, scores].append(mean)
    means = {key: statistics.fmean(values) for key, values in found.items()}
    return [
        Variance(
            *(name, kind, len(found[kind, ratio, scores]), ratio, scores),
            *(mean, mean / means[kind, ratio, "norms"]),
        )
        for (kind, ratio, scores), mean in means.items()
    ]


def _mean_variance(
    batches: list[Rows], scores: str, ratio: float, generator: torch.Generator
) -> float:
    draws = _PLACES if scores == "columns" else 1
    return statistics.fmean(
        added_variance(rows, scores_of(scores, rows, generator), round(ratio * len(rows.x)))
        for rows in batches
        for _ in range(draws)
    )


def measured(rounds: int = 30) -> Iterator[Time]:
    """Times on this machine, of all scores in turns."""
    for shape in CPU_SHAPES:
        m, n, p = shape
        x, g = torch.randn(m, n), torch.randn(m, p)
        for ratio in RATIOS:
            configs = {scores: _config(ratio, scores) for scores in SCORES}
            seconds: dict[str, list[float]] = {scores: [] for scores in SCORES}
            for _ in range(rounds):
                for scores, config in configs.items():
                    start = time.perf_counter()
                    weight_and_bias_grad(x, g, config, bias_grad=False)
                    seconds[scores].append(time.perf_counter() - start)
            for scores, ours in seconds.items():
                shares = [a / b for a, b in zip(ours, seconds["norms"], strict=True)]
                yield Time(
                    "{}, {} threads".format(*here()),
                    " x ".join(map(str, shape)),
                    ratio,
                    scores,
                    1e3 * statistics.median(ours),
                    statistics.median(shares),
                    4e-6 * m * numbers_read(scores, n, p),
                )


def predicted() -> Iterator[Time]:
    """PREDICTED times on GPUs, in bfloat16; of a graph that draws its columns on the GPU more."""
    # `make lint` leaves it out, because it compiles kernels.
    pages: Any = importlib.import_module("bench.microscope.predict")
    for target in (TARGETS["sm_90"], TARGETS["gfx942"]):
        for shape in GPU_SHAPES:
            for ratio in RATIOS:
                whole = pages.weight_grad(target, shape, _config(ratio, "norms"))
                for scores in SCORES:
                    ours = whole.seconds - whole.parts["score"]
                    ours += _seconds_of_scores(scores, shape, target)
                    yield Time(
                        f"PREDICTED {target.chip.name}",
                        " x ".join(map(str, shape)),
                        ratio,
                        scores,
                        1e3 * ours,
                        ours / whole.seconds,
                        2e-6 * shape[0] * numbers_read(scores, *shape[1:]),
                    )


def _config(ratio: str, scores: str) -> MemAOPConfig:
    return MemAOPConfig(ratio=value_of(ratio), memory="none", scores=scores)


def _seconds_of_scores(scores: str, shape: tuple[int, int, int], target: Target) -> float:
    from memaop_triton.kernels.gpu.score import TILE_OF_BLOCKS

    m, n, p = shape
    sides = {"norms": (n, p), "columns": (columns_read(n), columns_read(p)), "grad": (p, 0)}
    problem = Problem("row_scores", torch.bfloat16, m, m, *sides[scores])
    if scores != "columns":
        return predict(problem, heuristic(problem, target), target).seconds
    return predict(problem, TILE_OF_BLOCKS, target).seconds + _FLOOR_LAUNCHES * LAUNCH


def run(path: Path, data_dir: Path | None) -> Iterator[str]:
    """Measure what the file at `path` does not hold yet, write it there, and say it in lines."""
    content = json.loads(path.read_text("utf-8")) if path.exists() else {}
    parts: dict[str, Any] = {
        **{f"variance {name}": lambda name=name: variances(name, data_dir) for name in STEPS},
        "time": lambda: list(measured()),
        "predicted time": lambda: list(predicted()),
    }
    for part, make in parts.items():
        if part not in content:
            content[part] = [line._asdict() for line in make()]
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, _written(content))
        yield from _table(part, content[part])


def _written(content: dict[str, list[dict[str, Any]]]) -> str:
    """JSON with a line for every line of a table."""
    tables = []
    for part, lines in content.items():
        body = ",\n".join(f"  {json.dumps(_rounded(line))}" for line in lines)
        tables.append(f"{json.dumps(part)}: [\n{body}\n ]")
    return "{\n " + ",\n ".join(tables) + "\n}\n"


def _rounded(line: dict[str, Any]) -> dict[str, Any]:
    return {n: float(f"{v:.4g}") if isinstance(v, float) else v for n, v in line.items()}


def _table(part: str, lines: list[dict[str, Any]]) -> Iterator[str]:
    """A part in Markdown, the scores side by side."""
    value = "added" if "added" in lines[0] else "milliseconds"
    names = [name for name in lines[0] if name not in ("scores", "over_norms", "megabytes", value)]
    by_case: dict[tuple[str, ...], dict[str, dict[str, Any]]] = defaultdict(dict)
    for line in lines:
        by_case[tuple(str(line[name]) for name in names)][line["scores"]] = line
    others = SCORES[1:]
    yield f"| {' | '.join((*names, f'{value}, norms', *others))} |"
    yield "|---" * (len(names) + 1 + len(others)) + "|"
    for case, found in by_case.items():
        cells = [f"{found['norms'][value]:.3g}"]
        cells += [f"{found[scores]['over_norms']:.2f}" for scores in others]
        yield f"| {' | '.join((*case, *cells))} |"
