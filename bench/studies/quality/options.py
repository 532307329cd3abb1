"""Options that the commands of the study share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer

from memaop_triton.bench.studies.quality.running import Wanted
from memaop_triton.bench.studies.quality.schemes import ALL_RATIOS, SCHEMES
from memaop_triton.bench.studies.quality.tasks import TASKS
from memaop_triton.errors import check_name


def _one_of(option: str, allowed: Iterable[str]) -> typer.models.OptionInfo:
    def check(names: list[str] | None) -> list[str]:
        for name in names or ():
            try:
                check_name(option, name, allowed)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from None
        return names or []

    option_info: typer.models.OptionInfo = typer.Option(
        f"--{option}", callback=check, help=f"Of {', '.join(allowed)}; may be repeated."
    )
    return option_info


Tasks = Annotated[list[str] | None, _one_of("task", TASKS)]
Schemes = Annotated[list[str] | None, _one_of("scheme", SCHEMES)]
Ratios = Annotated[list[str] | None, _one_of("ratio", ALL_RATIOS)]
SeedCount = Annotated[int, typer.Option("--seeds", min=1, help="Runs of every cell.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of PyTorch; its own choice if not given.")
]
Output = Annotated[Path, typer.Option(help="Folder of the results.")]


def wanted(
    tasks: list[str] | None, schemes: list[str] | None, ratios: list[str] | None, seeds: int = 1
) -> Wanted:
    """What the filters of a command line leave."""
    return Wanted(tasks or (), schemes or (), ratios or (), seeds)


def use_threads(threads: int | None) -> None:
    """Set PyTorch's threads, if they are given."""
    if threads is not None:
        torch.set_num_threads(threads)
