"""`plan`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

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
from memaop_triton.config import DEFAULT_RATIO, UNBIASED_SELECTIONS, MemAOPConfig
from memaop_triton.errors import CommandError
from memaop_triton.plan import planning
from memaop_triton.plan.result import Plan


class Dtype(StrEnum):
    """What a layer can compute in."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FLOAT64 = "float64"


def _ratio_or_auto(value: str | None) -> float | str | None:
    """The number in (0, 1] that an option says, or "auto"; `None` if it was not given."""
    if value is None or value == "auto":
        return value
    try:
        return ratio_in_range(float(value))
    except ValueError:
        raise typer.BadParameter(f"{value!r} is neither a number nor 'auto'.") from None


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
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="From the model's output to a scalar loss; default: the loss in the output.",
        ),
    ] = None,
    batches: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Instead of --input: takes no arguments and returns a few batches of training, "
            "each what the model is called with. The noise of sampling is read from them.",
        ),
    ] = None,
    ratio: Annotated[
        str | None,
        typer.Option(
            callback=_ratio_or_auto,
            help="K/M, rows computed, or auto: what the library would decide. Default: auto for a "
            "model, where --selection and --grad-input allow it; else 1/8.",
        ),
    ] = None,
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
        float,
        typer.Option(callback=positive, help="Seconds for measuring, about; not with ratio auto."),
    ] = planning.TIME_BUDGET,
    json_path: JsonPath = None,
) -> None:
    """Measure which layers of a model get faster by conversion, and are worth it."""
    if (model is None) == (not shapes):
        raise CommandError("give --model, or at least one --shape, and not both.")
    if model is None and (inputs or batches or loss):
        raise CommandError("--input, --batches and --loss belong to a --model.")
    if model is not None and (not inputs) == (batches is None):
        raise CommandError("--model is called with --input, or with --batches: give one of them.")
    if loss and not batches:
        raise CommandError(
            "--loss needs --batches: random inputs do not show the noise of training."
        )
    may_be_auto = selection in UNBIASED_SELECTIONS and grad_input == "exact"
    default_ratio = "auto" if model is not None and may_be_auto else DEFAULT_RATIO
    config = config_of(
        rank,
        ratio=default_ratio if ratio is None else ratio,
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
        result = _of_model(model, inputs or [], batches, loss, config, dtype, device, budget)
    console = Console()
    # As text: a table that is wider than the terminal loses nothing then.
    console.print(str(result), markup=False, highlight=False, soft_wrap=True)
    if model is not None and config.is_auto and batches is None:
        console.print(
            "Only batches of training show the noise: give --batches, and --loss unless the model "
            "returns its loss.",
            highlight=False,
            soft_wrap=True,
        )
    if json_path is not None:
        write_json(json_path, result.to_dict())
    print_written(console, json_path)


def _of_model(
    reference: str,
    inputs: list[str],
    batches: str | None,
    loss: str | None,
    config: MemAOPConfig,
    dtype: Dtype | None,
    device: str | None,
    budget: float,
) -> Plan:
    wanted = None if device is None else _checked_device(device)
    model = loading.load_model(reference)
    model.to(device=wanted, dtype=None if dtype is None else getattr(torch, dtype))
    first = next(model.parameters(), torch.empty(0))
    settings: dict[str, Any] = {"config": config, "time_budget": budget}
    if batches is None:
        settings["example_inputs"] = loading.make_inputs(inputs, first.dtype, first.device)
        # Gradients at random numbers are those of no training, and their noise would mislead:
        # whatever the model returns is not taken for a loss.
        model.register_forward_hook(lambda _, __, output: (None, output))
    else:
        found = loading.load_batches(batches, first.device)
        settings |= {"example_inputs": found[0], "batches": found[1:]}
    if loss is not None:
        settings["loss_fn"] = loading.load("--loss", loss)
    try:
        return planning.plan(model, **settings)
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
