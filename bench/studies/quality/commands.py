"""The command line of the study, `python -m bench.studies.quality`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import TimeRemainingColumn

from memaop_triton.bench.studies.quality import (
    calibration,
    cheap_scores,
    crossterms,
    decided,
    noise,
    running,
    step_times,
    tables,
    tuning,
)
from memaop_triton.bench.studies.quality.schemes import (
    ALL_RATIOS,
    AUTO,
    AUTO_STASH,
    RATIO,
    SCHEMES,
    value_of,
)
from memaop_triton.bench.studies.quality.step_times import StepTime
from memaop_triton.bench.studies.quality.store import RESULTS, Run, Store
from memaop_triton.bench.studies.quality.tasks import TASKS
from memaop_triton.commands.common import DataDir, print_written, progress
from memaop_triton.errors import CommandError, check_name, require_extra

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="What sampled weight gradients cost in quality.",
)


class _Folders(NamedTuple):
    """What all commands share."""

    data: Path | None
    results: Path


@app.callback()
def _root(
    context: typer.Context,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of PyTorch; its own choice if not given.")
    ] = None,
    data_dir: DataDir = None,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    context.obj = _Folders(data_dir, output)


def _one_of(option: str, allowed: Iterable[str]) -> typer.models.OptionInfo:
    def check(names: list[str] | None) -> list[str] | None:
        for name in names or ():
            try:
                check_name(option, name, allowed)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from None
        return names

    option_info: typer.models.OptionInfo = typer.Option(
        f"--{option}", callback=check, help=f"Of {', '.join(allowed)}; may be repeated."
    )
    return option_info


Tasks = Annotated[list[str] | None, _one_of("task", TASKS)]
Schemes = Annotated[list[str] | None, _one_of("scheme", SCHEMES)]
Ratios = Annotated[list[str] | None, _one_of("ratio", ALL_RATIOS)]


@app.command()
def run(
    context: typer.Context,
    task: Tasks = None,
    scheme: Schemes = None,
    ratio: Ratios = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every cell.")] = running.SEEDS,
) -> None:
    """Train what has not been trained yet; it may be stopped and started again at any time."""
    folders: _Folders = context.obj
    store, console = Store(folders.results), Console()
    wanted = running.wanted(task, scheme, ratio)
    cells = [cell for cell in wanted if not SCHEMES[cell.scheme].decides]
    left = running.pending(cells, seeds, store.runs())
    every = seeds * len(cells)
    console.print(f"{every - len(left)} of {every} runs are there")
    with progress(console, TimeRemainingColumn()) as bar:
        overall = bar.add_task("runs", total=len(left))
        current = bar.add_task("", total=1)
        for job in left:
            name = f"{' '.join(job.cell)} seed {job.seed}"
            bar.reset(current, description=name, total=job.cell.problem.steps)
            done = running.do(
                job, store, folders.data, lambda step: bar.update(current, completed=step)
            )
            bar.advance(overall)
            _print(console, f"{name}: {_result(done)}")


@app.command()
def decide(
    context: typer.Context,
    task: Tasks = None,
    stash: Annotated[bool, typer.Option(help="Keep inputs in four bits.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every task.")] = running.SEEDS,
) -> None:
    """Train with ratio="auto" what is still to do, on a machine that does nothing else."""
    folders: _Folders = context.obj
    store, console = Store(folders.results), Console()
    scheme = AUTO_STASH if stash else AUTO
    cells = [cell for cell in running.wanted(task, [scheme]) if cell.scheme == scheme]
    for job in running.pending(cells, seeds, store.runs()):
        done, line = decided.do(job, store, folders.data)
        _print(console, f"{line.task} seed {line.seed}: {_result(done)}, {line.share:.3f} of dense")
        _print(console, f"  {line.sampled} of {line.steps} steps sampled; {line.summary}")


@app.command()
def tune(context: typer.Context, task: Tasks = None) -> None:
    """Try learning rates for the dense network; the best one goes into tasks.py."""
    folders: _Folders = context.obj
    path, console = folders.results / "tuning.csv", Console()
    for name in task or TASKS:
        for trial in tuning.tune(TASKS[name], path, folders.data):
            score = f"loss {trial.loss:.4f}, accuracy {trial.accuracy:.2f} %"
            _print(console, f"{name} lr {trial.lr:g} seed {trial.seed}: {score}")
        best = tuning.best_rate(TASKS[name], tables.read(path, tuning.Trial))
        used = f"{TASKS[name].optimizer.lr:g} is used"
        console.print(f"{name}: {'none' if best is None else f'{best:g}'} is best, {used}")


@app.command()
def time(
    context: typer.Context,
    task: Tasks = None,
    scheme: Schemes = None,
    ratio: Ratios = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=4, help="Of every cell that is not timed yet. [default: 10 or 32]"),
    ] = None,
) -> None:
    """Time training steps, in turns with dense ones, on a machine that does nothing else."""
    folders: _Folders = context.obj
    path, console = folders.results / "seconds.csv", Console()
    for cell in running.wanted(task, scheme, ratio):
        if cell.has_own_steps and not step_times.is_timed(cell, tables.read(path, StepTime)):
            one = step_times.measure(cell, folders.data, rounds)
            step_times.add(path, one)
            share = f"{one.share:.3f} of dense ({one.share_q1:.3f} to {one.share_q3:.3f})"
            _print(console, f"{' '.join(cell)}: {one.ms:.1f} ms, {share}")


@app.command("crossterms")
def cross_terms(context: typer.Context, task: Tasks = None, ratio: Ratios = None) -> None:
    """Sum weight gradients on frozen weights, beside the dense ones; MLP and GPT by default."""
    folders: _Folders = context.obj
    path, console = folders.results / "crossterms.csv", Console()
    for name in task or crossterms.TASKS:
        for one in ratio or crossterms.RATIOS:
            for layer in crossterms.run(name, one, path, folders.data):
                _print(console, f"{name} {one}: {layer}")


@app.command("noise")
def noise_of_a_step(context: typer.Context, task: Tasks = None, ratio: Ratios = None) -> None:
    """How noisy single weight gradients are, with a subspace of either side and without."""
    folders: _Folders = context.obj
    path, console = folders.results / "noise.csv", Console()
    for name in task or noise.NAMES:
        for step in noise.STEPS:
            for one in ratio or (RATIO,):
                for line in noise.run(name, step, value_of(one), path, folders.data):
                    where = f"{line.side}, rank {line.rank}, {line.k} rows"
                    what = f"{line.variance:.3g} (batch {line.own:.3g})"
                    _print(console, f"{name} step {step} {line.layer}: {where}: {what}")


@app.command("scores")
def scores_of_rows(context: typer.Context) -> None:
    """What scores that read less cost in variance and save in time; minutes, resumed if stopped."""
    folders: _Folders = context.obj
    for line in cheap_scores.run(folders.results / "scores.json", folders.data):
        _print(Console(), line)


@app.command()
def calibrate(
    context: typer.Context, task: Tasks = None, scheme: Schemes = None, ratio: Ratios = None
) -> None:
    """Measure how noisy dense's steps would be under schemes; those that have been run by default.

    It may be stopped and started again: only the way to the next step is trained again.
    """
    folders: _Folders = context.obj
    path, console = folders.results / "calibration.csv", Console()
    ran = {run.cell for run in Store(folders.results).runs()}
    for name in task or TASKS:
        chosen = running.wanted([name], scheme, ratio)
        covered = [
            cell for cell in chosen if calibration.is_covered(cell) and (scheme or cell in ran)
        ]
        for line in calibration.run(covered, 0, path, folders.data):
            _print(console, f"{name} {line}")


@app.command()
def report(context: typer.Context) -> None:
    """Write quality.md, quality.html and their pictures from what has been run so far."""
    require_extra("bench", "matplotlib", "scipy", "jinja2")
    from memaop_triton.bench.studies.quality.report import write

    print_written(Console(), *write(context.obj.results))


def _print(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)


def _result(run: Run) -> str:
    if run.diverged_at:
        return f"diverged at step {run.diverged_at}, {run.seconds:.0f} s"
    return f"loss {run.loss:.4f}, accuracy {run.accuracy:.2f} %, {run.seconds:.0f} s"


def main() -> None:
    """Entry point: for wrong options and missing data one line and exit code 2."""
    try:
        app()
    except CommandError as error:
        print(f"bench.studies.quality: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
