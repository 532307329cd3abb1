"""CSV files whose lines are named tuples of strings and numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

from memaop_triton.errors import CommandError
from memaop_triton.kernels.tuning.cache import replace_file

R = TypeVar("R", bound=NamedTuple)


class TableError(CommandError):
    """A file of results is not what it should be."""


def read(path: Path, kind: type[R]) -> list[R]:
    """The lines of a file; none if it is not there.

    A last line without its newline was cut off while it was written, and does not count.

    Raises:
        TableError: The head or another line does not fit `kind`.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    head, *rows = csv.reader(lines) if lines else [list(kind._fields)]
    if tuple(head) != kind._fields:
        wanted = ", ".join(kind._fields)
        raise TableError(f"{path} has the columns {', '.join(head)}, not {wanted}: move it away.")
    types = get_type_hints(kind)
    return [_parse(path, number, kind, types, row) for number, row in enumerate(rows, start=2)]


def _parse(path: Path, number: int, kind: type[R], types: dict[str, Any], row: list[str]) -> R:
    try:
        values = [types[name](value) for name, value in zip(kind._fields, row, strict=True)]
    except ValueError as error:
        raise TableError(f"{path}, line {number} is not a {kind.__name__}: {error}.") from None
    result: R = kind(*values)
    return result


def write(path: Path, kind: type[R], rows: Iterable[R]) -> None:
    """Replace a file at once: a concurrent reader sees the old lines or the new ones."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(kind._fields)
    writer.writerows([_written(value) for value in row] for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.getvalue())


def update(
    path: Path, rows: Sequence[R], key: Callable[[R], object], order: Callable[[R], Any]
) -> None:
    """Add lines to a file, in place of those with the same keys, and sort it by `order`."""
    new = {key(row) for row in rows}
    kind = type(rows[0])
    others = [row for row in read(path, kind) if key(row) not in new]
    write(path, kind, sorted([*others, *rows], key=order))


def _written(value: object) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)
