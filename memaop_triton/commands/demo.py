"""`demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
from memaop_triton.errors import CommandError, require_extra

if TYPE_CHECKING:
    from memaop_triton.experiments.demo.training import Training

Task = Literal["mlp", "finetune"]

_DATASETS = {
    "mlp": ("digits", "mnist", "fashion_mnist"),
    "finetune": ("newsgroups20", "reuters_r8"),
}
# Options that a task does not have, and why.
_MEANINGLESS: dict[Task, dict[str, str]] = {
    "mlp": {
        "steps": "its length is --epochs",
        "tokens": "images have none",
    },
    "finetune": {
        "epochs": "its length is --steps",
        "width": "the pretrained weights have theirs",
        "optimizer": "it is AdamW",
    },
}


def demo(
    task: Annotated[
        Task, typer.Option(help="mlp: learns images. finetune: a pretrained BERT learns texts.")
    ] = "mlp",
    dataset: Annotated[
        Literal["digits", "mnist", "fashion_mnist", "newsgroups20", "reuters_r8"] | None,
        typer.Option(help="What to train on; default: digits, newsgroups20 for finetune."),
    ] = None,
    data_dir: DataDir = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            callback=ratio_in_range,
            help="K/M of the schemes that do not decide; default: 0.125, 0.25 for finetune.",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Repetitions; default: 2, 1 for finetune.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="mlp only. Default: 120 for digits, 3 for the others.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="finetune only. Default: 120.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images or texts of a batch; default: 1024, 32 for finetune."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=3, max=512, help="Of a text, finetune only. Default: 64.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Units in each hidden layer, mlp only. Default: 1024.")
    ] = None,
    optimizer: Annotated[
        Literal["sgd", "adam"] | None,
        typer.Option(help="What updates the weights, mlp only. Default: sgd."),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(callback=positive, help="Learning rate; default: by task and optimizer."),
    ] = None,
    output: Output = Path("results"),
    json_path: JsonPath = None,
) -> None:
    """Train a network densely, with sampled weight gradients, and as the library decides."""
    options = {
        "dataset": dataset,
        "ratio": ratio,
        "seeds": seeds,
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "tokens": tokens,
        "width": width,
        "optimizer": optimizer,
        "lr": lr,
    }
    given = {name: value for name, value in options.items() if value is not None}
    _check(task, given)
    require_extra("demo", "sklearn", "matplotlib")
    from memaop_triton.experiments.demo import figure, report
    from memaop_triton.experiments.demo.training import run

    training = _mlp(given, data_dir) if task == "mlp" else _finetune(given, data_dir)
    console = Console()
    total = training.seeds * training.steps
    with progress(console, TextColumn("test accuracy {task.fields[accuracy]}")) as bar:
        rows = {
            scheme.key: bar.add_task(scheme.label, total=total, accuracy="–")
            for scheme in training.schemes
        }
        results = run(
            training,
            lambda key, done, accuracy: bar.update(
                rows[key], completed=done, accuracy=f"{100 * accuracy:.1f} %"
            ),
        )
    console.print(report.table(results, training))
    for line in report.decisions(results):
        console.print(line, highlight=False)
    console.print(report.explanation(training))
    path = output / f"demo_{training.name}.png"
    figure.save(path, results, training)
    if json_path is not None:
        write_json(json_path, report.as_json(results, training))
    print_written(console, path, json_path)


def _check(task: Task, given: dict[str, Any]) -> None:
    """Refuse what the task does not have."""
    for name, why in _MEANINGLESS[task].items():
        if name in given:
            raise CommandError(f"--{name} has no meaning with --task={task}: {why}.")
    dataset = given.get("dataset")
    if dataset is not None and dataset not in _DATASETS[task]:
        raise CommandError(
            f"--dataset={dataset} is not for --task={task}: take {' or '.join(_DATASETS[task])}."
        )


def _mlp(given: dict[str, Any], data_dir: Path | None) -> Training:
    from memaop_triton.experiments import data
    from memaop_triton.experiments.demo import mlp

    if given.get("dataset", "digits") != "digits":
        given = {"epochs": 3} | given
    settings = mlp.Settings(**given)
    return mlp.training(settings, data.load_images(settings.dataset, data_dir))


def _finetune(given: dict[str, Any], data_dir: Path | None) -> Training:
    from memaop_triton.experiments import posts
    from memaop_triton.experiments.bert import MiniLm
    from memaop_triton.experiments.demo import finetune

    settings = finetune.Settings(**given)
    texts = posts.load_texts(settings.dataset, data_dir, settings.tokens)
    return finetune.training(settings, texts, MiniLm(data_dir))
