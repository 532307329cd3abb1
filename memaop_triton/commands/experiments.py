"""`demo` and `reproduce`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import TextColumn

from memaop_triton.commands.common import (
    JsonPath,
    Output,
    positive,
    progress,
    ratio_in_range,
    require_file,
    say_written,
    write_json,
)
from memaop_triton.errors import require_extra


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


# Batch size, epochs, seeds: about a minute on two cores for digits, several for the others.
_DEMO_DEFAULTS = {
    Dataset.DIGITS: (1024, 30, 3),
    Dataset.MNIST: (1024, 3, 3),
    Dataset.FASHION_MNIST: (1024, 3, 3),
}


DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Directory of the data files; default: $MEMAOP_TRITON_DATA_DIR, or download."
    ),
]


def _figure(output: Path, name: str, json_path: Path | None) -> Path:
    """The figure's path, once it is known that the results can be written."""
    figure = output / f"{name}.png"
    require_file("--output", figure)
    if json_path is not None:
        require_file("--json", json_path)
    return figure


def demo(
    dataset: Annotated[Dataset, typer.Option(help="What to train on.")] = Dataset.DIGITS,
    data_dir: DataDir = None,
    ratio: Annotated[
        float, typer.Option(callback=ratio_in_range, help="K/M, rows computed.")
    ] = 0.125,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Repetitions; default: by data set.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: by data set.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: by data set.")] = None,
    width: Annotated[int, typer.Option(min=1, help="Units in each hidden layer.")] = 1024,
    optimizer: Annotated[Optimizer, typer.Option(help="What updates the weights.")] = Optimizer.SGD,
    lr: Annotated[
        float | None, typer.Option(callback=positive, help="Learning rate; default: by optimizer.")
    ] = None,
    output: Output = Path("results"),
    json_path: JsonPath = None,
) -> None:
    """Train a network densely and with sampled weight gradients, side by side."""
    from memaop_triton.experiments import data, demo_report
    from memaop_triton.experiments.demo import (
        LEARNING_RATES,
        Settings,
        run_demo,
        schemes,
        total_steps,
    )

    require_extra("demo", "sklearn", "matplotlib")
    figure = _figure(output, f"demo_{dataset}_{optimizer}", json_path)
    default_batch, default_epochs, default_seeds = _DEMO_DEFAULTS[dataset]
    seeds = seeds or default_seeds
    settings = Settings(
        ratio,
        seeds,
        epochs or default_epochs,
        batch_size or default_batch,
        width,
        LEARNING_RATES[optimizer] if lr is None else lr,
        str(optimizer),
    )
    images = data.load_images(dataset, data.resolve_data_dir(data_dir))
    console = Console()
    steps = seeds * total_steps(settings, images)
    with progress(console, TextColumn("test accuracy {task.fields[accuracy]}")) as bar:
        rows = {
            scheme.key: bar.add_task(scheme.label, total=steps, accuracy="–")
            for scheme in schemes(ratio)
        }
        results = run_demo(
            settings,
            images,
            lambda key, done, accuracy: bar.update(
                rows[key], completed=done, accuracy=f"{100 * accuracy:.1f} %"
            ),
        )
    console.print(demo_report.table(results, settings, dataset))
    console.print(demo_report.explanation())
    demo_report.save_figure(figure, results, settings, dataset)
    if json_path is not None:
        write_json(json_path, demo_report.as_json(results, settings, dataset))
    say_written(console, figure, json_path)


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

    require_extra("demo", "matplotlib")
    figure = _figure(output, f"reproduce_{experiment}", json_path)
    setup = paper.EXPERIMENTS[experiment]
    directory = data.resolve_data_dir(data_dir)
    paper.load_problem(setup.name, directory)
    tasks = paper.make_tasks(setup, runs or setup.runs, epochs or setup.epochs, seed, directory)
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
    paper_report.save_figure(figure, setup, summaries)
    if json_path is not None:
        write_json(json_path, paper_report.as_json(setup, seed, summaries))
    say_written(console, figure, json_path)
