"""`bench`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import TextColumn

from memaop_triton.bench.suites import SUITES
from memaop_triton.commands.common import make_folder, print_written, progress
from memaop_triton.errors import require_extra

# With a load average above this fraction of the cores, times are not reliable.
_BUSY = 0.25
_LISTED = [name for name in SUITES if name != "smoke"]


def _runnable_suite(value: str) -> str:
    if value not in SUITES:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(_LISTED)}.")
    if SUITES[value].device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(
            f"{value} needs a GPU, and torch.cuda.is_available() is False: quick and cpu run "
            "without one."
        )
    return value


def bench(
    suite: Annotated[
        str,
        typer.Option(
            callback=_runnable_suite,
            metavar="|".join(_LISTED),
            help="; ".join(f"{name}: {SUITES[name].about}" for name in _LISTED) + ".",
        ),
    ] = "quick",
    output: Annotated[
        Path, typer.Option(callback=make_folder, help="Directory for the results and the report.")
    ] = Path("results"),
    only: Annotated[
        str | None, typer.Option(help="Benchmarks whose name matches, as in pytest -k.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of PyTorch; default: its own choice.")
    ] = None,
) -> int:
    """Measure dense, ours and the literature's methods on this machine, and write a report."""
    require_extra("bench", "pytest", "pytest_benchmark", "matplotlib", "scipy", "jinja2")
    from memaop_triton.bench import report
    from memaop_triton.bench.run import run_suite

    json_path = output / f"{suite}.json"
    console = Console()
    _warn_if_busy(console)
    with progress(console, TextColumn("{task.fields[last]}")) as bar:
        row = bar.add_task(f"bench {suite}", total=None, last="")
        outcome = run_suite(
            suite,
            json_path,
            only=only,
            threads=threads,
            on_progress=lambda done, total, name: bar.update(
                row, completed=done, total=total, last=name
            ),
        )
    html, markdown = report.write(json_path, output)
    print_written(console, json_path, outcome.log, markdown, html)
    for name in outcome.failed:
        _print_line(console, f"failed: {name}: see the log")
    return 1 if outcome.failed else 0


def _print_line(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _warn_if_busy(console: Console) -> None:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > _BUSY * (os.cpu_count() or 1):
        _print_line(
            console,
            f"The load average is {load:.1f}: something else is running, so times will vary.",
        )
