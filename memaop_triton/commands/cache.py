"""`cache list | show | export | import | clear`: the user's tuned configurations."""

from __future__ import annotations

import json
from collections import Counter
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
from memaop_triton.kernels.tuning import cache_files
from memaop_triton.kernels.tuning.cache_entries import (
    SCHEMA,
    ConfigFile,
    ConfigFileError,
    Entry,
    check_owner,
    config_of,
    parse,
)
from memaop_triton.kernels.tuning.problem import KERNELS

app = typer.Typer(help="The configurations that tuning found, by GPU and kernel.")

GpuName = Annotated[str | None, typer.Option("--gpu", help="Only GPUs with this in their name.")]
KernelName = Annotated[str | None, typer.Option("--kernel", help=f"One of {', '.join(KERNELS)}.")]


def _files(gpu: str | None, kernel: str | None) -> dict[Path, ConfigFile | ConfigFileError]:
    """The files of the cache that match, or why they cannot be read."""
    if kernel is not None and kernel not in KERNELS:
        raise CommandError(f"--kernel={kernel} is not one of {', '.join(KERNELS)}.")
    found: dict[Path, ConfigFile | ConfigFileError] = {}
    for path in sorted(config_cache.folder().glob("*/*.json")):
        if kernel is not None and path.stem != kernel:
            continue
        file: ConfigFile | ConfigFileError | None
        try:
            file = cache_files.read(path)
        except ConfigFileError as error:
            file = error
        names = [path.parent.name]
        if isinstance(file, ConfigFile):
            names.append(file.gpu.name.lower())
        if file is not None and (gpu is None or any(gpu.lower() in name for name in names)):
            found[path] = file
    return found


def _readable(
    found: dict[Path, ConfigFile | ConfigFileError], console: Console
) -> list[ConfigFile]:
    for path, file in found.items():
        if isinstance(file, ConfigFileError):
            console.print(Text(f"left out {path}: {file}"), soft_wrap=True)
    return [file for file in found.values() if isinstance(file, ConfigFile)]


def _state(kernel: str, entry: Entry) -> str:
    """What an entry is worth here: "fresh", "stale" or "unused"."""
    if entry.source != config_cache.source_hash(kernel):
        return "unused"
    try:
        config_of(kernel, entry.config)
    except ValueError:
        return "unused"
    return "fresh" if entry.triton == config_cache.triton_version() else "stale"


@app.command("list")
def list_files(gpu: GpuName = None, kernel: KernelName = None) -> None:
    """Show the files: GPUs, kernels, numbers of entries.

    A stale entry was compiled by another Triton: it serves until it is tuned anew. One of other
    kernels (of another version of this package), or one that is not valid, is not used.
    """
    console, found = Console(), _files(gpu, kernel)
    table = Table("GPU", "kernel")
    for title in ("entries", "fresh", "stale", "not used"):
        table.add_column(title, justify="right")
    for path, file in found.items():
        if isinstance(file, ConfigFileError):
            table.add_row(Text(path.parent.name), Text(path.stem), Text(f"not readable: {file}"))
            continue
        states = Counter(_state(file.kernel, entry) for entry in file.entries)
        unused = states["unused"] + len(file.refused)
        counts = (len(file.entries) + len(file.refused), states["fresh"], states["stale"], unused)
        table.add_row(Text(file.gpu.name), Text(file.kernel), *map(str, counts))
    if found:
        console.print(table)
    console.print(
        f"{len(found)} files in {config_cache.folder()}", highlight=False, markup=False,
        soft_wrap=True,
    )  # fmt: skip


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
                Text(" ".join(f"{name}={int(value)}" for name, value in entry.config.items())),
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
    content = {"schema": SCHEMA, "files": [file.to_json() for file in files]}
    try:
        cache_files.replace_file(target, json.dumps(content, indent=1))
    except OSError as error:
        raise CommandError(f"FILE={target} cannot be written: {error.strerror}.") from error
    say_written(console, target)


@app.command("import")
def import_file(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="What `cache export` wrote.")],
) -> None:
    """Add the entries of a file. Of two about the same problem the one tuned later stays."""
    console = Console()
    for file in _exported(source):
        if file.refused:
            what = f"{file.kernel}: {len(file.refused)} entries left out, {file.refused[0]}"
            console.print(Text(what), soft_wrap=True)
        path = config_cache.path_of(config_cache.folder(), file.gpu, file.kernel)
        try:
            for line in _conflicts(path, file):
                console.print(Text(line), soft_wrap=True)
            kernel_source = config_cache.source_hash(file.kernel)
            cache_files.merge_into(path, file, source=kernel_source)
        except (OSError, ConfigFileError) as error:
            raise CommandError(f"{path} cannot be written: {error}.") from error
        what = f"{len(file.entries)} entries of {file.kernel} on {file.gpu.name}"
        console.print(Text(f"imported {what}"), soft_wrap=True)


def _exported(source: Path) -> list[ConfigFile]:
    try:
        content: Any = json.loads(source.read_bytes())
    except OSError as error:
        raise CommandError(f"FILE={source} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CommandError(f"FILE={source} is not JSON: {error}.") from error
    parts = content.get("files") if isinstance(content, dict) else None
    if not isinstance(parts, list):
        raise CommandError(f"FILE={source} is not what `cache export` writes.")
    try:
        files = [parse(part) for part in parts]
    except ConfigFileError as error:
        raise CommandError(f"FILE={source} cannot be used: {error}.") from error
    return [_without_invalid(file) for file in files]


def _without_invalid(file: ConfigFile) -> ConfigFile:
    """The same without entries whose configuration the kernels here do not take."""
    kept, refused = [], list(file.refused)
    for entry in file.entries:
        try:
            config_of(file.kernel, entry.config)
        except ValueError as error:
            refused.append(str(error))
        else:
            kept.append(entry)
    return ConfigFile(file.gpu, file.kernel, tuple(kept), tuple(refused))


def _conflicts(path: Path, new: ConfigFile) -> list[str]:
    """A line for every entry that both have, with other configurations."""
    there = cache_files.read(path)
    if there is None:
        return []
    check_owner(there, new.gpu, new.kernel)
    held = {entry.identity: entry for entry in there.entries}
    lines = []
    for entry in new.entries:
        old = held.get(entry.identity)
        if old is None or dict(old.config) == dict(entry.config):
            continue
        kept = "the imported one" if entry.tuned >= old.tuned else "that of the cache"
        lines.append(
            f"{new.kernel} {entry.problem}: two configurations, {old.milliseconds:.4f} ms in the "
            f"cache and {entry.milliseconds:.4f} ms imported; {kept} was tuned later and stays"
        )
    return lines


@app.command()
def clear(
    gpu: GpuName = None,
    kernel: KernelName = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete the files that match. What is needed is tuned anew."""
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
            with FileLock(f"{path}.lock", timeout=cache_files.LOCK_SECONDS):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise CommandError(f"{path} cannot be deleted: {error}.") from error
    console.print(f"deleted {len(found)} files")
