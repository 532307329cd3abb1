"""Reading JSON with errors that name the file and the field."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from memaop_triton.errors import CommandError


class ReportError(CommandError):
    """A file of results is missing or is not what the benchmarks write."""


def read_json(path: Path) -> Fields:
    """The object in a JSON file; `ReportError` if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: {error}.") from None
    return Fields(content, path.name)


class Fields:
    """A JSON object and where it stands, for the messages.

    Every getter raises `ReportError` for a field that is missing or of another type. `where` reads
    like `cpu.json: benchmarks[3].extra_info`.
    """

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise ReportError(f"{where} is {_shown(value)}: an object is wanted.")
        self._value = value
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self._value.get(name) is not None

    def _get(self, name: str, wanted: str) -> Any:
        if name not in self._value:
            raise ReportError(f"{self.where}.{name} is missing: {wanted} is wanted.")
        return self._value[name]

    def _wrong(self, name: str, wanted: str) -> ReportError:
        value = self._value[name]
        return ReportError(f"{self.where}.{name} is {_shown(value)}: {wanted} is wanted.")

    def text(self, name: str) -> str:
        """A string."""
        value = self._get(name, "a string")
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def optional_text(self, name: str) -> str | None:
        """A string; `None` if null or missing."""
        return self.text(name) if name in self else None

    def integer(self, name: str, least: int = 0) -> int:
        """A whole number, not below `least`."""
        wanted = f"a whole number from {least}"
        value = self._get(name, wanted)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._wrong(name, wanted)
        return value

    def optional_integer(self, name: str) -> int | None:
        """A whole number; `None` if null or missing."""
        return self.integer(name) if name in self else None

    def number(self, name: str) -> float:
        """A number; NaN for null, which is how some writers spell it."""
        value = self._get(name, "a number")
        if value is None:
            return math.nan
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, "a number")
        return float(value)

    def positive(self, name: str) -> float:
        """A number above 0."""
        value = self.number(name)
        if not (value > 0 and math.isfinite(value)):
            raise self._wrong(name, "a number above 0")
        return value

    def optional_positive(self, name: str) -> float | None:
        """A number above 0; `None` if null or missing."""
        return self.positive(name) if name in self else None

    def object(self, name: str) -> Fields:
        """An object."""
        return Fields(self._get(name, "an object"), f"{self.where}.{name}")

    def optional_object(self, name: str) -> Fields:
        """An object; empty if null or missing."""
        return self.object(name) if name in self else Fields({}, f"{self.where}.{name}")

    def objects(self, name: str) -> list[Fields]:
        """A list of objects."""
        value = self._get(name, "a list")
        if not isinstance(value, list):
            raise self._wrong(name, "a list")
        return [Fields(one, f"{self.where}.{name}[{i}]") for i, one in enumerate(value)]

    def names(self) -> Iterator[str]:
        """Names of the fields, in the file's order."""
        return iter(self._value)

    def plain(self) -> Mapping[str, str]:
        """Every field as text, for fields that are shown and not computed with."""
        return {name: _plain(value) for name, value in self._value.items() if value is not None}


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value).replace('"', "")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
