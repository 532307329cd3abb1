"""`demo` and `reproduce`."""

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
    positive,
    print_written,
    progress,
    ratio_in_range,
    write_json,
)
from memaop_triton.errors import require_extra


def demo(
    dataset: Annotated[
        Literal["digits", "mnist", "fashion_mnist"], typer.Option(help="What to train on.")
    ] = "digits",
    data_dir: DataDir = None,
    ratio: Annotated[
        float, typer.Option(callback=ratio_in_range, help="K/M, rows computed.")
    ] = 0.125,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions.")] = 3,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Default: 30 for digits, 3 for the others.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="M, rows of a batch.")] = 1024,
    width: Annotated[int, typer.Option(min=1, help="Units in each hidden layer.")] = 1024,
    optimizer: Annotated[
        Literal["sgd", "adam"], typer.Option(help="What updates the weights.")
    ] = "sgd",
    lr: Annotated[
        float | None, typer.Option(callback=positive, help="Learning rate; default: by optimizer.")
    ] = None,
    output: Output = Path("results"),
    json_path: JsonPath = None,
) -> None:
    """Train a network densely and with sampled weight gradients, side by side."""
    require_extra("demo", "sklearn", "matplotlib")
    from memaop_triton.experiments import data, demo_report
    from memaop_triton.experiments.demo import (
        LEARNING_RATES,
        Settings,
        run_demo,
        schemes,
        total_steps,
    )

    # About a minute on two cores for digits, several for the others.
    epochs = epochs or (30 if dataset == "digits" else 3)
    settings = Settings(
        dataset, ratio, seeds, epochs, batch_size, width, optimizer, lr or LEARNING_RATES[optimizer]
    )
    images = data.load_images(dataset, data_dir)
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
    console.print(demo_report.table(results, settings))
    console.print(demo_report.explanation())
    figure = output / f"demo_{dataset}_{optimizer}.png"
    demo_report.save_figure(figure, results, settings)
    if json_path is not None:
        write_json(json_path, demo_report.as_json(results, settings))
    print_written(console, figure, json_path)


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
