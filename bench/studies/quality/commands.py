"""The command line of the study, `python -m bench.studies.quality`."""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import TextColumn

from memaop_triton.bench.studies.quality import (
    crossterms,
    noise,
    running,
    step_times,
    tables,
    tuning,
)
from memaop_triton.bench.studies.quality.options import (
    Output,
    Ratios,
    Schemes,
    SeedCount,
    Tasks,
    Threads,
    use_threads,
    wanted,
)
from memaop_triton.bench.studies.quality.schemes import RATIO, value_of
from memaop_triton.bench.studies.quality.step_times import StepTime
from memaop_triton.bench.studies.quality.store import RESULTS, Run, Store
from memaop_triton.bench.studies.quality.tasks import TASKS
from memaop_triton.bench.studies.quality.tuning import Trial
from memaop_triton.commands.common import DataDir, progress, say_written
from memaop_triton.errors import CommandError, require_extra

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="What sampled weight gradients cost in quality.",
)


@app.command()
def run(
    task: Tasks = None,
    scheme: Schemes = None,
    ratio: Ratios = None,
    seeds: SeedCount = 3,
    threads: Threads = None,
    data_dir: DataDir = None,
    output: Output = RESULTS,
) -> None:
    """Train what has not been trained yet; it may be stopped and started again at any time."""
    use_threads(threads)
    store, console = Store(output), Console()
    jobs = wanted(task, scheme, ratio, seeds).jobs()
    runs = store.runs()
    left = running.pending(jobs, runs)
    console.print(f"{len(jobs) - len(left)} of {len(jobs)} runs are there, {_estimate(left, runs)}")
    with progress(console, TextColumn("{task.fields[estimate]}")) as bar:
        overall = bar.add_task("runs", total=len(left), estimate="")
        current = bar.add_task("", total=1, estimate="")
        for number, job in enumerate(left, start=1):
            name = f"{job.cell.task} {job.cell.scheme} {job.cell.ratio} seed {job.seed}"
            bar.reset(current, description=name, total=job.cell.problem.steps)
            done, _ = running.do(
                job, store, data_dir, lambda step: bar.update(current, completed=step)
            )
            runs.append(done)
            estimate = _estimate(left[number:], runs)
            bar.update(overall, advance=1, estimate=estimate)
            console.print(f"{name}: {_result(done)}; {estimate}", highlight=False, soft_wrap=True)


@app.command()
def tune(
    task: Tasks = None,
    threads: Threads = None,
    data_dir: DataDir = None,
    output: Output = RESULTS,
) -> None:
    """Try learning rates for the dense network; the best one goes into tasks.py."""
    use_threads(threads)
    console = Console()

    def print_trial(trial: Trial) -> None:
        score = f"loss {trial.loss:.4f}, accuracy {trial.accuracy:.2f} %"
        console.print(f"{trial.task} lr {trial.lr:g} seed {trial.seed}: {score}", highlight=False)

    for name in task or TASKS:
        best = tuning.tune(TASKS[name], output / "tuning.csv", data_dir, print_trial)
        used = f"{TASKS[name].optimizer.lr:g} is used"
        console.print(f"{name}: {'none' if best is None else f'{best:g}'} is best, {used}")


@app.command()
def time(
    task: Tasks = None,
    scheme: Schemes = None,
    ratio: Ratios = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=4, help="Of every cell that is not timed yet. [default: 10 or 32]"),
    ] = None,
    threads: Threads = None,
    data_dir: DataDir = None,
    output: Output = RESULTS,
) -> None:
    """Time training steps, in turns with dense ones, on a machine that does nothing else."""
    use_threads(threads)
    console, path = Console(), output / "seconds.csv"
    left = [cell for cell in wanted(task, scheme, ratio).cells() if cell.has_own_steps]
    for cell in left:
        times = tables.read(path, StepTime)
        if step_times.is_timed(cell, times):
            continue
        one = step_times.measure(cell, data_dir, rounds)
        step_times.add(path, one)
        name = f"{cell.task} {cell.scheme} {cell.ratio}"
        share = f"{one.share:.3f} of dense ({one.share_q1:.3f} to {one.share_q3:.3f})"
        console.print(f"{name}: {one.ms:.1f} ms, {share}", highlight=False, soft_wrap=True)


@app.command("crossterms")
def cross_terms(
    task: Tasks = None,
    ratio: Ratios = None,
    threads: Threads = None,
    data_dir: DataDir = None,
    output: Output = RESULTS,
) -> None:
    """Sum weight gradients on frozen weights, beside the dense ones; MLP and GPT by default."""
    use_threads(threads)
    console = Console()
    for name in task or crossterms.TASKS:
        for one in ratio or crossterms.RATIOS:
            on_layer = partial(_print, console, f"{name} {one}:")
            crossterms.run(name, one, output / "crossterms.csv", data_dir, on_layer)


@app.command("noise")
def noise_of_a_step(
    task: Tasks = None,
    ratio: Ratios = None,
    threads: Threads = None,
    data_dir: DataDir = None,
    output: Output = RESULTS,
) -> None:
    """How noisy single weight gradients are, with a subspace of either side and without."""
    use_threads(threads)
    console = Console()
    for name in task or noise.NAMES:
        for step in noise.STEPS:
            for one in ratio or (RATIO,):
                lines = noise.run(name, step, value_of(one), output / "noise.csv", data_dir)
                for line in lines:
                    where = f"{line.side}, rank {line.rank}, {line.k} rows"
                    what = f"{line.variance:.3g} (batch {line.own:.3g})"
                    _print(console, f"{name} step {step} {line.layer}: {where}: {what}")


@app.command()
def report(output: Output = RESULTS) -> None:
    """Write quality.md, quality.html and their pictures from what has been run so far."""
    require_extra("bench", "matplotlib", "scipy", "jinja2")
    from memaop_triton.bench.studies.quality.report import write

    say_written(Console(), *write(output))


def _print(console: Console, *words: str) -> None:
    console.print(*words, highlight=False)


def _result(run: Run) -> str:
    if run.diverged_at:
        return f"diverged at step {run.diverged_at}, {run.seconds:.0f} s"
    return f"loss {run.loss:.4f}, accuracy {run.accuracy:.2f} %, {run.seconds:.0f} s"


def _estimate(left: list[running.Job], runs: list[Run]) -> str:
    seconds = running.remaining_seconds(left, runs)
    if seconds is None:
        unseen = {job.cell.task for job in left} - {run.task for run in runs}
        known = [job for job in left if job.cell.task not in unseen]
        seconds = running.remaining_seconds(known, runs) or 0.0
        more = f" and {', '.join(sorted(unseen))}, not timed yet"
    else:
        more = ""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{len(left)} left: {f'{hours} h ' if hours else ''}{minutes} min{more}"


def main() -> None:
    """Entry point: for wrong options and missing data one line and exit code 2."""
    try:
        app()
    except CommandError as error:
        print(f"bench.studies.quality: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
