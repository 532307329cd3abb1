"""The command line `memaop-triton`: options in, tables and files out."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from memaop_triton import __version__
from memaop_triton.experiments.errors import ExperimentError, require_extra, require_output

PROGRAM = "memaop-triton"

app = typer.Typer(add_completion=False, help="A cheaper backward pass for PyTorch linear layers.")


class Dataset(StrEnum):
    """What the demo can train on."""

    DIGITS = "digits"
    MNIST = "mnist"
    FASHION_MNIST = "fashion_mnist"


class Paper(StrEnum):
    """An experiment of the paper."""

    ENERGY = "energy"
    MNIST = "mnist"


class Optimizer(StrEnum):
    """What the demo can train with."""

    SGD = "sgd"
    ADAM = "adam"


# Batch size, epochs: about a minute on two cores for digits, several for the larger sets.
_DEMO_DEFAULTS = {
    Dataset.DIGITS: (1024, 60),
    Dataset.MNIST: (1024, 3),
    Dataset.FASHION_MNIST: (1024, 3),
}


def _positive(value: float | None) -> float | None:
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise typer.BadParameter(f"{value} is not a positive number.")
    return value


def _ratio(value: float) -> float:
    if not 0 < value <= 1:
        raise typer.BadParameter(f"{value} is not in (0, 1]: it is K/M, 0.125 for 1/8.")
    return value


DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Directory of the data files; default: $MEMAOP_TRITON_DATA_DIR, or download."
    ),
]
Output = Annotated[Path, typer.Option(help="Directory for the figure.")]
JsonPath = Annotated[Path | None, typer.Option("--json", help="File for the numbers.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    dataset: Annotated[Dataset, typer.Option(help="What to train on.")] = Dataset.DIGITS,
    data_dir: DataDir = None,
    ratio: Annotated[float, typer.Option(callback=_ratio, help="K/M, rows computed.")] = 0.125,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions.")] = 3,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: by data set.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: by data set.")] = None,
    width: Annotated[int, typer.Option(min=1, help="Units in each hidden layer.")] = 1024,
    optimizer: Annotated[Optimizer, typer.Option(help="What updates the weights.")] = Optimizer.SGD,
    lr: Annotated[
        float | None, typer.Option(callback=_positive, help="Learning rate; default: by optimizer.")
    ] = None,
    output: Output = Path("results"),
    json_path: JsonPath = None,
) -> None:
    """Train a network densely and with sampled weight gradients, side by side."""
    from memaop_triton.experiments import data, demo_report
    from memaop_triton.experiments.demo import (
        OPTIMIZERS,
        Settings,
        run_demo,
        schemes,
        total_steps,
    )

    require_extra("sklearn", "matplotlib")
    require_output(output, json_path)
    default_batch, default_epochs = _DEMO_DEFAULTS[dataset]
    settings = Settings(
        ratio,
        seeds,
        epochs or default_epochs,
        batch_size or default_batch,
        width,
        OPTIMIZERS[optimizer].lr if lr is None else lr,
        str(optimizer),
    )
    images = data.load_images(dataset, data.resolve_data_dir(data_dir))
    console = Console()
    steps = seeds * total_steps(settings, images)
    with _progress(console, TextColumn("test accuracy {task.fields[accuracy]}")) as progress:
        rows = {
            scheme.key: progress.add_task(scheme.label, total=steps, accuracy="–")
            for scheme in schemes(ratio)
        }
        results = run_demo(
            settings,
            images,
            lambda key, done, accuracy: progress.update(
                rows[key], completed=done, accuracy=f"{100 * accuracy:.1f} %"
            ),
        )
    console.print(demo_report.table(results, settings, dataset))
    console.print(demo_report.explanation())
    figure = output / f"demo_{dataset}_{optimizer}.png"
    demo_report.save_figure(figure, results, settings, dataset)
    if json_path is not None:
        demo_report.save_json(json_path, results, settings, dataset)
    _say_written(console, figure, json_path)


@app.command()
def reproduce(
    experiment: Annotated[
        Paper, typer.Argument(help="energy: figure 3, a regression. mnist: figure 4.")
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
    from memaop_triton.experiments import data, paper, paper_report

    require_extra("matplotlib")
    require_output(output, json_path)
    setup = paper.EXPERIMENTS[experiment]
    directory = data.resolve_data_dir(data_dir)
    paper.load_problem(setup.name, directory)
    tasks = paper.make_tasks(setup, runs or setup.runs, epochs or setup.epochs, seed, directory)
    console = Console()
    outcomes = []
    with _progress(console, TextColumn("{task.fields[last]}")) as progress:
        row = progress.add_task(f"reproduce {experiment}", total=len(tasks), last="")
        for outcome in paper.run_tasks(tasks, jobs):
            outcomes.append(outcome)
            last = f"{outcome.scheme.label}: loss {outcome.losses[-1]:.3f}"
            progress.update(row, advance=1, last=last)
    summaries = paper_report.summarise(setup, outcomes)
    console.print(paper_report.table(setup, summaries))
    figure = output / f"reproduce_{experiment}.png"
    paper_report.save_figure(figure, setup, summaries)
    if json_path is not None:
        paper_report.save_json(json_path, setup, seed, summaries)
    _say_written(console, figure, json_path)


def _progress(console: Console, extra: TextColumn) -> Progress:
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


def _say_written(console: Console, *paths: Path | None) -> None:
    for path in paths:
        if path is not None:
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)


# Where Typer keeps the base class of its usage errors differs between versions.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[
    typer.BadParameter.__mro__.index(Exception) - 1
]


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code.

    A wrong option, missing data or a missing package is told in one line on standard error, code 2.
    """
    try:
        code: Any = app(args=list(arguments), prog_name=PROGRAM, standalone_mode=False)
    except _USAGE_ERROR as error:
        usage_error: Any = error
        message = usage_error.format_message()
    except ExperimentError as error:
        message = str(error)
    except (typer.Abort, KeyboardInterrupt):
        print(f"{PROGRAM}: stopped", file=sys.stderr)
        return 130
    else:
        return code if isinstance(code, int) else 0
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def main() -> None:
    """Entry point of the console command."""
    sys.exit(run(sys.argv[1:]))
