"""`tune`: time the kernels of given shapes, or of a model, on this machine's GPU."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import TextColumn
from rich.table import Table
from rich.text import Text
from torch import nn

from memaop_triton.commands import loading
from memaop_triton.commands.common import config_of, print_written, progress, ratio_in_range
from memaop_triton.config import MemAOPConfig
from memaop_triton.convert import convert_
from memaop_triton.errors import CommandError
from memaop_triton.kernels.tuning.cache import Entry
from memaop_triton.kernels.tuning.config import Config, Problem, in_words
from memaop_triton.plan.observing import run_backward


class Dtype(StrEnum):
    """What the kernels take."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


def tune(
    shapes: Annotated[
        list[str] | None, typer.Option(help="MxNxP of a layer: rows, inputs, outputs. Repeatable.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="package.module:function that returns an nn.Module.")
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help=f"Of --model, repeatable: {loading.INPUT_FORMAT}."),
    ] = None,
    ratio: Annotated[
        float, typer.Option(callback=ratio_in_range, help="K/M, rows computed.")
    ] = 0.125,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Default: bfloat16; of --model, its own.")
    ] = None,
    autocast: Annotated[
        bool, typer.Option("--autocast", help="Run --model under autocast to --dtype.")
    ] = False,
    selection: Annotated[str, typer.Option(help="Which rows.")] = "priority",
    memory: Annotated[str, typer.Option(help="What is remembered.")] = "subspace",
    rank: Annotated[int | None, typer.Option(help="Of --memory=subspace; default: 16.")] = None,
    block_rows: Annotated[int, typer.Option(help="Rows of a block.")] = 1,
    grad_input: Annotated[str, typer.Option(help="exact, sampled or projected.")] = "exact",
    scores: Annotated[str, typer.Option(help="norms, columns or grad.")] = "norms",
) -> None:
    """Time the kernels' configurations on this GPU, and keep the best in the cache.

    Every kernel that the layers use is tuned again, also if the cache has it; each with the rows of
    a batch rounded up to a power of two, so other batches of about the same size are served too.
    """
    if (shapes is None) == (model is None):
        raise CommandError("name what to tune: --shapes MxNxP or --model package.module:function.")
    if (model is None) != (inputs is None):
        raise CommandError("--model and --input belong together: --input 32x512x1024.")
    config = config_of(
        rank,
        ratio=ratio,
        selection=selection,
        memory=memory,
        block_rows=block_rows,
        grad_input=grad_input,
        scores=scores,
    )
    sizes = [loading.parse_shape("--shapes", text) for text in shapes or ()]
    net = None if model is None else loading.load_model(model)
    device = _gpu()
    from memaop_triton.kernels.tuning import cache, tuner

    console = Console()
    with progress(console, TextColumn("")) as bars:

        def walk(problem: Problem, configs: list[Config]) -> Iterable[Config]:
            return bars.track(configs, description=f"{problem.kernel} {problem.key}")

        with tuner.forced(walk) as outcomes:
            if net is None:
                for m, n, p in sizes:
                    _step_of_layers(m, n, p, config, device, getattr(torch, dtype or "bfloat16"))
            else:
                _step_of_model(net, inputs or [], config, device, dtype, autocast)
    if not outcomes:
        raise CommandError("no Triton kernel ran, so none was tuned: are all rows computed?")
    console.print(_table(outcomes))
    gpu = cache.gpu_of(device)
    assert gpu is not None
    print_written(console, cache.folder() / gpu.slug)


def _gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise CommandError(
            "there is nothing to tune: kernels are tuned on a GPU, and torch.cuda.is_available() "
            "is False."
        )
    return torch.device("cuda", torch.cuda.current_device())


def _table(outcomes: list[tuple[Problem, Entry | None]]) -> Table:
    """A line per problem: the heuristic's time, the best, and the configuration that has it."""
    made = Table("kernel", "problem")
    for title in ("heuristic ms", "best ms", "gain"):
        made.add_column(title, justify="right")
    made.add_column("configuration")
    for problem, tuned in outcomes:
        words = ["–", "–", "–", "none runs"]
        if tuned is not None:
            before = tuned.heuristic_milliseconds
            words = [
                "–" if before is None else f"{before:.4f}",
                f"{tuned.milliseconds:.4f}",
                "–" if before is None else f"{before / tuned.milliseconds:.2f}×",
                in_words(tuned.config),
            ]
        made.add_row(*(Text(word) for word in (problem.kernel, problem.key, *words)))
    return made


def _with_both_sides(config: MemAOPConfig) -> list[MemAOPConfig]:
    """The configuration, and its variants with either side that training may choose."""
    subspace = config.subspace
    if subspace is None or subspace.side != "auto":
        return [config]
    others = (dataclasses.replace(subspace, side=side) for side in ("input", "grad"))
    return [config, *(dataclasses.replace(config, memory=other) for other in others)]


def _step_of_layers(
    m: int, n: int, p: int, config: MemAOPConfig, device: torch.device, dtype: torch.dtype
) -> None:
    """A training step of a layer with a bias and of one without: they use other kernels."""
    for bias, one in itertools.product((True, False), _with_both_sides(config)):
        linear = nn.Linear(n, p, bias=bias, device=device, dtype=dtype)
        layer = convert_(nn.Sequential(linear), one)
        x = torch.randn(m, n, device=device, dtype=dtype, requires_grad=True)
        layer(x).backward(torch.randn(m, p, device=device, dtype=dtype))


def _step_of_model(
    model: nn.Module,
    texts: list[str],
    config: MemAOPConfig,
    device: torch.device,
    dtype: Dtype | None,
    autocast: bool,
) -> None:
    chosen: torch.dtype | None = getattr(torch, dtype) if dtype else None
    model = model.to(device) if autocast else model.to(device, chosen)
    own = next((a.dtype for a in model.parameters() if a.is_floating_point()), torch.float32)
    inputs = loading.make_inputs(texts, own, device)
    try:
        with torch.autocast(device.type, chosen or torch.bfloat16, enabled=autocast):
            for one in _with_both_sides(config):
                run_backward(convert_(copy.deepcopy(model), one), inputs)
    except ValueError as error:
        raise CommandError(f"--model: {error}") from error
