"""What a run has found so far: lines of JSON in one file, which several processes extend.

A case leaves a line when it begins and one when it ends, so that a case that took its process with
it can be named.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FILE = "results.jsonl"
TILES = "configs"  # the folder of tuned tiles, as `kernels.tuning.cache` names it
#: How a case can end. "died": its process did; "cut off": at a time limit.
PASSED, FAILED, SKIPPED, DIED, CUT_OFF = "passed", "failed", "skipped", "died", "cut off"
ENDS = (PASSED, FAILED, SKIPPED, DIED, CUT_OFF)
BEGUN = "begun"

Record = dict[str, Any]


def write(folder: Path, stage: str, name: str, status: str, **figures: Any) -> None:
    """Append a line: one write, so that lines of several processes do not mix.

    Args:
        folder: Of the results.
        stage: That the case belongs to.
        name: Of the case, unique in its stage.
        status: `BEGUN` or one of `ENDS`.
        figures: What else there is to keep, as JSON can hold it.
    """
    line = json.dumps({"stage": stage, "name": name, "status": status, **figures}) + "\n"
    handle = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, line.encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def read(folder: Path) -> list[Record]:
    """All lines so far; one that a killed process left unfinished is not counted."""
    path, found = folder / FILE, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def ended(found: Iterable[Record], stage: str) -> list[Record]:
    """The cases of a stage that ended, in the order in which they did."""
    return [one for one in found if one["stage"] == stage and one["status"] in ENDS]


def begun(found: Iterable[Record], stage: str) -> list[Record]:
    """The cases of a stage that began and have not ended."""
    open_cases: dict[str, Record] = {}
    for one in found:
        if one["stage"] == stage:
            open_cases.pop(one["name"], None)
            if one["status"] == BEGUN:
                open_cases[one["name"]] = one
    return list(open_cases.values())


def start(folder: Path) -> None:
    """Make the folder, and set aside what an earlier run in it found.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    if path.exists():
        made = datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y%m%d-%H%M%S")
        for old in (path, folder / TILES):
            if old.exists():
                old.replace(old.with_stem(f"{old.stem}-{made}"))
