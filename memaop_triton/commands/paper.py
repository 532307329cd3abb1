"""`reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import TextColumn

from memaop_triton.commands.common import (
    DataDir,
    JsonPath,
    Output,
    print_written,
    progress,
    write_json,
)
from memaop_triton.errors import require_extra


def reproduce(
    experiment: Annotated[
        Literal["energy", "mnist"],
        typer.Argument(help="energy: figure 3, a regression. mnist: figure 4."),
    ],
    runs: Annotated[
        int | None, typer.Option(min=1, help="Of each of 19 schemes; default: 10 energy, 3 mnist.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: the paper's.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 1,
    data_dir: DataDir = None,
    seed: Annotated[int, typer.Option(min=0, help="Every run's seed is derived from it.")] = 0,
    output: Output = Path("results"),
    json_path: JsonPath = None,
) -> None:
    """Repeat an experiment of arXiv 2110.09164 by its authors' protocol, beside their numbers."""
    require_extra("demo", "matplotlib")
    from memaop_triton.experiments import paper, paper_report

    setup = paper.EXPERIMENTS[experiment]
    paper.load_problem(experiment, data_dir)
    tasks = paper.make_tasks(setup, runs or setup.runs, epochs or setup.epochs, seed, data_dir)
    console = Console()
    outcomes = []
    with progress(console, TextColumn("{task.fields[last]}")) as bar:
        row = bar.add_task(f"reproduce {experiment}", total=len(tasks), last="")
        for outcome in paper.run_tasks(tasks, jobs):
            outcomes.append(outcome)
            last = f"{outcome.scheme.label}: loss {outcome.losses[-1]:.3f}"
            bar.update(row, advance=1, last=last)
    summaries = paper_report.summarise(setup, outcomes)
    console.print(paper_report.table(setup, summaries))
    figure = output / f"reproduce_{experiment}.png"
    paper_report.save_figure(figure, setup, summaries)
    if json_path is not None:
        write_json(json_path, paper_report.as_json(setup, seed, summaries))
    print_written(console, figure, json_path)
