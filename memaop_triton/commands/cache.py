"""`cache list | show | export | import | clear`: the user's tuned configurations."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from filelock import FileLock
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memaop_triton.commands.common import say_written
from memaop_triton.errors import CommandError
from memaop_triton.kernels.tuning import cache as config_cache
from memaop_triton.kernels.tuning.cache import SCHEMA, ConfigFile, Entry
from memaop_triton.kernels.tuning.config import KERNELS, in_words

app = typer.Typer(help="The configurations that tuning found, by GPU and kernel.")

GpuName = Annotated[str | None, typer.Option("--gpu", help="Only GPUs with this in their name.")]
KernelName = Annotated[str | None, typer.Option("--kernel", help=f"One of {', '.join(KERNELS)}.")]


def _files(gpu: str | None, kernel: str | None) -> dict[Path, ConfigFile | str]:
    """The files of the cache that match, or why they cannot be read."""
    if kernel is not None and kernel not in KERNELS:
        raise CommandError(f"--kernel={kernel} is not one of {', '.join(KERNELS)}.")
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


def _readable(found: dict[Path, ConfigFile | str], console: Console) -> list[ConfigFile]:
    for path, file in found.items():
        if isinstance(file, str):
            console.print(Text(f"left out {path}: {file}"), soft_wrap=True)
    return [file for file in found.values() if isinstance(file, ConfigFile)]


def _state(kernel: str, entry: Entry) -> str:
    """What an entry is worth here: "fresh", "stale" or "unused"."""
    if entry.source != config_cache.source_hash(kernel):
        return "unused"
    return "fresh" if entry.triton == config_cache.triton_version() else "stale"


@app.command("list")
def list_files(gpu: GpuName = None, kernel: KernelName = None) -> None:
    """Show the files: GPUs, kernels, numbers of entries.

    A stale entry was compiled by another Triton: it serves where nothing is tuned, if it compiles.
    One of other kernels (of another version of this package) is not used.
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
    for file in _readable(_files(gpu, kernel), console):
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
def export(
    target: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")],
    gpu: GpuName = None,
    kernel: KernelName = None,
) -> None:
    """Write all entries into one file, for another machine with the same GPU."""
    console = Console()
    files = _readable(_files(gpu, kernel), console)
    if not files:
        raise CommandError(f"there is nothing to export in {config_cache.folder()}.")
    content = {"schema": SCHEMA, "files": [config_cache.to_json(file) for file in files]}
    try:
        config_cache.replace_file(target, json.dumps(content, indent=1))
    except OSError as error:
        raise CommandError(f"FILE={target} cannot be written: {error.strerror}.") from error
    say_written(console, target)


@app.command("import")
def import_file(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="What `cache export` wrote.")],
) -> None:
    """Add the entries of a file. Of two about the same problem the one tuned later stays."""
    console = Console()
    try:
        content: Any = json.loads(source.read_bytes())
        files = [config_cache.parse(part) for part in content["files"]]
    except OSError as error:
        raise CommandError(f"FILE={source} cannot be read: {error.strerror}.") from error
    except (KeyError, TypeError, ValueError) as error:
        raise CommandError(f"FILE={source} is not what `cache export` writes: {error}.") from error
    for file in files:
        path = config_cache.path_of(config_cache.folder(), file.gpu, file.kernel)
        try:
            new = replace(file, entries=_later(file, path))
            config_cache.merge_into(path, new)
        except OSError as error:
            raise CommandError(f"{path} cannot be written: {error}.") from error
        what = f"imported {len(new.entries)} of {len(file.entries)} entries"
        left = "others are of other kernels, or the cache has later ones"
        where = f"of {file.kernel} on {file.gpu.name}"
        console.print(
            Text(f"{what} {where}" + (f"; {left}" if new != file else "")), soft_wrap=True
        )


def _later(file: ConfigFile, path: Path) -> tuple[Entry, ...]:
    """The entries of a file that can be used here and are later than those at `path`."""
    try:
        there = config_cache.read(path)
    except ValueError:
        there = None
    held = {entry.identity: entry.tuned for entry in (there.entries if there else ())}
    return tuple(
        entry
        for entry in file.entries
        if _state(file.kernel, entry) != "unused" and entry.tuned > held.get(entry.identity, "")
    )


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
