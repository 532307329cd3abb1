"""`plan`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import torch
import typer
from rich.console import Console

from memaop_triton.commands import loading
from memaop_triton.commands.common import (
    JsonPath,
    config_of,
    positive,
    print_written,
    ratio_in_range,
    write_json,
)
from memaop_triton.config import DEFAULT_RATIO, MemAOPConfig
from memaop_triton.errors import CommandError
from memaop_triton.plan import planning
from memaop_triton.plan.result import Plan


class Dtype(StrEnum):
    """What a layer can compute in."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FLOAT64 = "float64"


def plan(
    model: Annotated[
        str | None,
        typer.Option(
            help="package.module:function, which takes no arguments and returns the model."
        ),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="[NAME=]SIZES[:DTYPE[:BOUND]]",
            help="What the model is called with, in order or by name: 32x512x1024 (random "
            "numbers), 32x512:int64:50257 (integers below 50257), mask=32x512:bool.",
        ),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="MxNxP", help="A layer by itself, instead of a model."),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of the model and its inputs; default: the model's own, or float32."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1; default: the model's own, or a GPU if there is one."),
    ] = None,
    ratio: Annotated[
        float, typer.Option(callback=ratio_in_range, help="K/M, rows computed.")
    ] = DEFAULT_RATIO,
    selection: Annotated[str, typer.Option(help="Which rows.")] = "priority",
    memory: Annotated[str, typer.Option(help="What is remembered.")] = "subspace",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of --memory=subspace; default: 16.")
    ] = None,
    grad_input: Annotated[
        str, typer.Option(help="exact, sampled (dX from K rows too) or projected.")
    ] = "exact",
    scores: Annotated[
        str, typer.Option(help="norms, columns or grad: what rows are picked by.")
    ] = "norms",
    budget: Annotated[
        float, typer.Option(callback=positive, help="Seconds for measuring, about.")
    ] = planning.TIME_BUDGET,
    json_path: JsonPath = None,
) -> None:
    """Measure which layers of a model get faster by conversion, and by how much."""
    if (model is None) == (not shapes):
        raise CommandError("give --model, or at least one --shape, and not both.")
    if (model is None) != (not inputs):
        raise CommandError("--model and --input belong together: the model is called with them.")
    config = config_of(
        rank,
        ratio=ratio,
        selection=selection,
        memory=memory,
        grad_input=grad_input,
        scores=scores,
    )
    if model is None:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        result = planning.plan_shapes(
            [loading.parse_shape("--shape", text) for text in shapes or []],
            config,
            dtype=getattr(torch, dtype or Dtype.FLOAT32),
            device=_checked_device(device or default),
            time_budget=budget,
        )
    else:
        result = _of_model(model, inputs or [], config, dtype, device, budget)
    console = Console()
    # As text: a table that is wider than the terminal loses nothing then.
    console.print(str(result), markup=False, highlight=False, soft_wrap=True)
    if json_path is not None:
        write_json(json_path, result.to_dict())
    print_written(console, json_path)


def _of_model(
    reference: str,
    inputs: list[str],
    config: MemAOPConfig,
    dtype: Dtype | None,
    device: str | None,
    budget: float,
) -> Plan:
    wanted = None if device is None else _checked_device(device)
    model = loading.load_model(reference)
    model.to(device=wanted, dtype=None if dtype is None else getattr(torch, dtype))
    first = next(model.parameters(), torch.empty(0))
    example_inputs = loading.make_inputs(inputs, first.dtype, first.device)
    try:
        return planning.plan(model, config, example_inputs=example_inputs, time_budget=budget)
    except (ValueError, TypeError) as error:
        raise CommandError(str(error)) from error
    except (RuntimeError, IndexError) as error:
        raise CommandError(
            f"--model={reference!r} fails on these inputs: {type(error).__name__}: {error}"
        ) from error


def _checked_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"--device={name!r} cannot be used: {reason}") from None
    return device
