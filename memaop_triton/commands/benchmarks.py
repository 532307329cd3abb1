"""`bench`."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import TextColumn

from memaop_triton.bench.suites import SUITES
from memaop_triton.commands.common import positive, progress, say_written
from memaop_triton.errors import CommandError, check_name

# A processor that is busy for this part of its cores gives times that mean little.
_BUSY = 0.25
_LISTED = [name for name in SUITES if name != "smoke"]


def _known_suite(value: str) -> str:
    try:
        check_name("suite", value, SUITES)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(_LISTED)}.") from None
    return value


def bench(
    suite: Annotated[
        str,
        typer.Option(
            callback=_known_suite,
            metavar="|".join(_LISTED),
            help="; ".join(f"{name}: {SUITES[name].about}" for name in _LISTED) + ".",
        ),
    ] = "quick",
    output: Annotated[Path, typer.Option(help="Directory for the results and the report.")] = Path(
        "results"
    ),
    compare: Annotated[
        Path | None, typer.Option(help="JSON file of an earlier run to compare with.")
    ] = None,
    fail_if_slower: Annotated[
        float | None,
        typer.Option(
            callback=positive,
            metavar="PERCENT",
            help="Exit with 1 if a speed-up fell by more since the earlier run, beyond its spread.",
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Benchmarks whose name matches, as in pytest -k.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of PyTorch; default: its own choice.")
    ] = None,
) -> int:
    """Measure dense, ours and the literature's methods on this machine, and write a report."""
    from memaop_triton.bench.run import require_packages, run_suite

    require_packages()
    from memaop_triton.bench import report
    from memaop_triton.bench.report.data import load

    _check_device(suite)
    if fail_if_slower is not None and compare is None:
        raise CommandError(
            f"--fail-if-slower={fail_if_slower:g} needs an earlier run: name its file by --compare."
        )
    if compare is not None:
        load(compare)  # an error is worth more now than in five minutes
    _make_writable(output)
    console = Console()
    _warn_if_busy(console)
    json_path = output / f"{suite}.json"
    with _kept(compare) as earlier:
        with progress(console, TextColumn("{task.fields[last]}")) as bar:
            row = bar.add_task(f"bench {suite}", total=None, last="")
            outcome = run_suite(
                suite,
                json_path,
                only=only,
                threads=threads,
                tell=lambda now: bar.update(
                    row, completed=now.done, total=now.total, last=now.name
                ),
            )
        written = report.write(json_path, output, name=suite, compare=earlier)
        slower = [] if fail_if_slower is None else written.regressions(fail_if_slower)
    say_written(console, json_path, outcome.log, written.markdown, written.html)
    for name in outcome.failed:
        _say(console, f"failed: {name}: the log says why")
    for line in slower:
        _say(console, f"slower: {line}")
    return 1 if slower or outcome.failed else 0


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _check_device(suite: str) -> None:
    if SUITES[suite].device == "cuda" and not torch.cuda.is_available():
        raise CommandError(
            f"--suite={suite} needs a GPU, and torch.cuda.is_available() is False: quick and cpu "
            "run without one."
        )


def _make_writable(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise CommandError(
            f"--output={output} cannot be written: {error.strerror}. Name another place."
        ) from None


def _warn_if_busy(console: Console) -> None:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > _BUSY * (os.cpu_count() or 1):
        _say(
            console,
            f"The load average is {load:.1f}: something else is running, and times will scatter.",
        )


@contextlib.contextmanager
def _kept(compare: Path | None) -> Iterator[Path | None]:
    """A copy of the earlier run, which may be the file that this run replaces."""
    with tempfile.TemporaryDirectory() as folder:
        yield None if compare is None else Path(shutil.copy(compare, folder))
