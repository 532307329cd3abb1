"""Files of tuned configurations: read by anybody at any time, changed by one process at a time.

Several processes, users and versions of the package may share a file. It is only ever replaced as a
whole: lock, read again, merge, write a file beside it, rename. So a reader, who takes no lock, sees
one state or the next, and a process that is killed leaves at most a file that nobody reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import stat
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from filelock import FileLock

from memaop_triton.kernels.tuning.cache_entries import (
    ConfigFile,
    ConfigFileError,
    Entry,
    check_owner,
    now,
    parse,
    written,
)

LOCK_SECONDS = 5.0
_MOST_BYTES = 16 << 20
_FOREIGN_KEPT = timedelta(days=30)


def read(path: Path) -> ConfigFile | None:
    """The contents of a file, `None` if there is none.

    Raises:
        ConfigFileError: It cannot be read, or `parse` refuses it.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConfigFileError("it is not a file", replaceable=False)
        if status.st_size > _MOST_BYTES:
            raise ConfigFileError(f"it has more than {_MOST_BYTES} bytes", replaceable=True)
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigFileError(str(error), replaceable=False) from error
    except (ValueError, RecursionError) as error:
        raise ConfigFileError(f"it is not JSON ({error})", replaceable=True) from error
    return parse(content)


def merge_into(
    path: Path, new: ConfigFile, *, source: str, timeout: float = LOCK_SECONDS
) -> ConfigFile:
    """Add entries to a file, which is made if there is none; what it holds afterwards.

    Args:
        path: The file.
        new: What to add. Of two entries about the same the one tuned later stays.
        source: The hash of this version. Entries of other versions are left to these for 30 days.
        timeout: Seconds to wait for another process that is writing.

    Raises:
        OSError: It cannot be written, or another process holds the lock (`filelock.Timeout`).
        ConfigFileError: What is there must not be replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=timeout):
        merged = dataclasses.replace(new, entries=merge(_entries_of(path, new), new.entries))
        oldest = written(datetime.now(UTC) - _FOREIGN_KEPT)
        kept = [e for e in merged.entries if e.source == source or e.tuned >= oldest]
        merged = dataclasses.replace(merged, entries=tuple(kept))
        for left in path.parent.glob(f".{path.name}.*"):  # by a process that was killed
            left.unlink(missing_ok=True)
        replace_file(path, json.dumps(merged.to_json(), indent=1))
    return merged


def merge(one: Iterable[Entry], other: Iterable[Entry]) -> tuple[Entry, ...]:
    """The entries of both by problem; of two about the same the later one, of `other` in a tie."""
    moment = now()

    def time(entry: Entry) -> str:
        """What lies in the future was tuned by a clock that is wrong, and gives way."""
        return entry.tuned if entry.tuned <= moment else ""

    found: dict[tuple[str, str, str], Entry] = {}
    for entry in (*one, *other):
        before = found.get(entry.identity)
        if before is None or time(entry) >= time(before):
            found[entry.identity] = entry
    return tuple(found[identity] for identity in sorted(found))


def replace_file(path: Path, text: str) -> None:
    """Write `text` to `path` such that whoever reads it sees all of it or what was there before."""
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        # Not by `tempfile`, whose files nobody else can read: the umask decides here.
        with part.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _entries_of(path: Path, new: ConfigFile) -> tuple[Entry, ...]:
    try:
        found = read(path)
    except ConfigFileError as error:
        if not error.replaceable:
            raise
        return ()
    if found is None:
        return ()
    check_owner(found, new.gpu, new.kernel)
    return found.entries
