"""What subcommands share: checks of options, the progress bar, names of written files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from memaop_triton.config import MemAOPConfig
from memaop_triton.config.parts import Subspace
from memaop_triton.errors import CommandError
from memaop_triton.experiments.data import DATA_DIR_VARIABLE


def positive(value: float | None) -> float | None:
    """Refuse a number that is not positive and finite."""
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise typer.BadParameter(f"{value} is not a positive number.")
    return value


def ratio_in_range(value: float | None) -> float | None:
    """Refuse a ratio outside (0, 1]."""
    if value is not None and not 0 < value <= 1:
        raise typer.BadParameter(f"{value} is not in (0, 1]: it is K/M, 0.125 for 1/8.")
    return value


def make_folder(folder: Path) -> Path:
    """Make a folder for results before they are computed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(
            f"{folder} cannot be written: {error.strerror}. Name another place."
        ) from None
    return folder


def _make_parent(path: Path | None) -> Path | None:
    if path is not None:
        make_folder(path.parent)
    return path


def write_json(path: Path, content: Any) -> None:
    """Write numbers, strings, lists and dictionaries."""
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


DataDir = Annotated[
    Path | None,
    typer.Option(
        envvar=DATA_DIR_VARIABLE,
        exists=True,
        file_okay=False,
        help="Directory of the data files; without it they are downloaded.",
    ),
]
Output = Annotated[Path, typer.Option(callback=make_folder, help="Directory for the figure.")]
JsonPath = Annotated[
    Path | None,
    typer.Option("--json", dir_okay=False, callback=_make_parent, help="File for the numbers."),
]


def progress(console: Console, extra: ProgressColumn) -> Progress:
    """A bar per task with the steps done, the time taken, and one more column."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        extra,
        console=console,
        # Drawing more often would disturb the measurements.
        refresh_per_second=2,
    )


def print_written(console: Console, *paths: Path | None) -> None:
    """Name the files that were written."""
    for path in paths:
        if path is not None:
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def config_of(rank: int | None, *, memory: str, **settings: Any) -> MemAOPConfig:
    """The configuration that these options describe.

    Raises:
        CommandError: They contradict each other, or one is out of range.
    """
    try:
        if rank is None:
            return MemAOPConfig(memory=memory, **settings)
        if memory != "subspace":
            raise ValueError(
                f"--rank={rank} has no meaning beside --memory={memory}: leave it out."
            )
        return MemAOPConfig(memory=Subspace(rank=rank), **settings)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
