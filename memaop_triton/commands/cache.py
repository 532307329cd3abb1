"""`cache list | show | clear`: the user's tuned configurations."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from filelock import FileLock
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memaop_triton.errors import CommandError
from memaop_triton.kernels.tuning import cache as config_cache
from memaop_triton.kernels.tuning.cache import SOURCES, ConfigFile, Entry
from memaop_triton.kernels.tuning.config import in_words

app = typer.Typer(help="The configurations that tuning found, by GPU and kernel.")

GpuName = Annotated[str | None, typer.Option("--gpu", help="Only GPUs with this in their name.")]
KernelName = Annotated[str | None, typer.Option("--kernel", help=f"One of {', '.join(SOURCES)}.")]


def _files(gpu: str | None, kernel: str | None) -> dict[Path, ConfigFile | str]:
    """The files of the cache that match, or why they cannot be read."""
    if kernel is not None and kernel not in SOURCES:
        raise CommandError(f"--kernel={kernel} is not one of {', '.join(SOURCES)}.")
    found: dict[Path, ConfigFile | str] = {}
    for path in sorted(config_cache.folder().glob(f"*/{kernel or '*'}.json")):
        file: ConfigFile | str | None
        try:
            file = config_cache.read(path)
        except (OSError, ValueError) as error:
            file = str(error)
        names = [path.parent.name]
        if isinstance(file, ConfigFile):
            names.append(file.gpu.name.lower())
        if file is not None and (gpu is None or any(gpu.lower() in name for name in names)):
            found[path] = file
    return found


def _state(kernel: str, entry: Entry) -> str:
    """State of an entry on this machine: "fresh", "stale" or "unused"."""
    if entry.source != config_cache.source_hash(kernel):
        return "unused"
    return "fresh" if entry.triton == config_cache.triton_version() else "stale"


@app.command("list")
def list_files(gpu: GpuName = None, kernel: KernelName = None) -> None:
    """Show the files: GPUs, kernels, numbers of entries.

    A fresh entry is used. A stale one was compiled by another Triton, and serves that one; one that
    is not used belongs to the kernels of another version of this package.
    """
    console, found = Console(), _files(gpu, kernel)
    table = Table("GPU", "kernel")
    for title in ("entries", "fresh", "stale", "not used"):
        table.add_column(title, justify="right")
    for path, file in found.items():
        if isinstance(file, str):
            table.add_row(Text(path.parent.name), Text(path.stem), Text(f"not readable: {file}"))
            continue
        states = Counter(_state(file.kernel, entry) for entry in file.entries)
        counts = (len(file.entries), states["fresh"], states["stale"], states["unused"])
        table.add_row(Text(file.gpu.name), Text(file.kernel), *map(str, counts))
    if found:
        console.print(table)
    console.print(Text(f"{len(found)} files in {config_cache.folder()}"), soft_wrap=True)


@app.command()
def show(gpu: GpuName = None, kernel: KernelName = None) -> None:
    """Show the entries: problems, times, configurations."""
    console = Console()
    for path, file in _files(gpu, kernel).items():
        if isinstance(file, str):
            console.print(Text(f"left out {path}: {file}"), soft_wrap=True)
            continue
        table = Table("problem", title=Text(f"{file.kernel} on {file.gpu.name}"))
        for title in ("ms", "heuristic ms"):
            table.add_column(title, justify="right")
        for title in ("configuration", "state", "Triton", "tuned"):
            table.add_column(title)
        for entry in file.entries:
            before = entry.heuristic_milliseconds
            table.add_row(
                Text(entry.problem),
                f"{entry.milliseconds:.4f}",
                "–" if before is None else f"{before:.4f}",
                Text(in_words(entry.config)),
                _state(file.kernel, entry),
                Text(entry.triton),
                entry.tuned[:16],
            )
        console.print(table)


@app.command()
def clear(
    gpu: GpuName = None,
    kernel: KernelName = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete the files that match. Kernels that are needed are tuned again."""
    found = _files(gpu, kernel)
    console = Console()
    if not found:
        console.print(
            Text(f"there is nothing to delete in {config_cache.folder()}"), soft_wrap=True
        )
        return
    for path in found:
        console.print(Text(str(path)), soft_wrap=True)
    if not yes:
        typer.confirm(f"Delete {len(found)} files?", abort=True)
    for path in found:
        try:
            with FileLock(f"{path}.lock", timeout=config_cache.LOCK_SECONDS):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise CommandError(f"{path} cannot be deleted: {error}.") from error
    console.print(f"deleted {len(found)} files")
