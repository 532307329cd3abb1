"""CSV files whose lines are named tuples of strings and numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

from filelock import FileLock

from memaop_triton.errors import CommandError
from memaop_triton.kernels.tuning.cache import replace_file

R = TypeVar("R", bound=NamedTuple)


class TableError(CommandError):
    """A file of results is not what it should be."""


def read(path: Path, kind: type[R]) -> list[R]:
    """The lines of a file; none if it is not there.

    Raises:
        TableError: The head or another line does not fit `kind`.
    """
    if not path.exists():
        return []
    head, *lines = csv.reader(path.read_text(encoding="utf-8").splitlines())
    if tuple(head) != kind._fields:
        wanted = ", ".join(kind._fields)
        raise TableError(f"{path} has the columns {', '.join(head)}, not {wanted}: move it away.")
    types = get_type_hints(kind).values()
    found: list[R] = []
    for number, line in enumerate(lines, start=2):
        try:
            found.append(kind(*(t(value) for t, value in zip(types, line, strict=True))))
        except ValueError as error:
            raise TableError(f"{path}, line {number} is not a {kind.__name__}: {error}.") from None
    return found


def update(path: Path, kind: type[R], rows: Iterable[R], key: Callable[[R], Any]) -> None:
    """Add lines to a file, in place of those with the same keys, and sort it by key.

    The file is replaced at once, so that a concurrent reader sees the old lines or the new ones and
    a process that is killed loses nothing; concurrent writers wait for each other.
    """
    rows = list(rows)
    new = {key(row) for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(".lock")):
        rows += [row for row in read(path, kind) if key(row) not in new]
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(kind._fields)
        writer.writerows([_written(value) for value in row] for row in sorted(rows, key=key))
        replace_file(path, text.getvalue())


def _written(value: object) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)
