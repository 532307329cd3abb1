"""What subcommands share: checks of options, the progress bar, the word of what was written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def positive(value: float | None) -> float | None:
    """Refuse a number that is not positive and finite."""
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise typer.BadParameter(f"{value} is not a positive number.")
    return value


def ratio_in_range(value: float) -> float:
    """Refuse a ratio outside (0, 1]."""
    if not 0 < value <= 1:
        raise typer.BadParameter(f"{value} is not in (0, 1]: it is K/M, 0.125 for 1/8.")
    return value


Output = Annotated[Path, typer.Option(help="Directory for the figure.")]
JsonPath = Annotated[Path | None, typer.Option("--json", help="File for the numbers.")]


def progress(console: Console, extra: TextColumn) -> Progress:
    """A bar per task with what is done, the time it took, and one more column."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        extra,
        console=console,
        # Drawing takes time from what is measured.
        refresh_per_second=2,
    )


def say_written(console: Console, *paths: Path | None) -> None:
    """Name the files that were written."""
    for path in paths:
        if path is not None:
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)
