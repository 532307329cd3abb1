"""Reading JSON into dataclasses, by the types of their fields, with errors that name the field."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NewType, Union, get_args, get_origin, get_type_hints

from memaop_triton.errors import CommandError

#: Any value as text, for fields that are shown and not computed with.
Shown = NewType("Shown", str)

_WANTED = {str: "a string", int: "a whole number", float: "a number above 0", list: "a list"}


class ReportError(CommandError):
    """A file of results is missing or is not what the benchmarks write."""


def read_json(path: Path) -> Any:
    """What a JSON file holds; `ReportError` if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: {error}.") from None


def parse(kind: Any, value: Any, where: str, **given: Any) -> Any:
    """A value of JSON as a `kind`: a dataclass, `Mapping`, `Literal`, `list`, str, int or float.

    An int is not negative, a float is above 0. A field of a dataclass that is null or missing takes
    its default; those in `given` are not read.

    Args:
        kind: The type; of a union with `None` the first member.
        value: As `json.loads` gives it.
        where: Its place, for the message: `cpu.json: benchmarks[3].extra_info`.
        **given: Fields of a dataclass.

    Raises:
        ReportError: The value is of another type, or a field without a default is missing.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else parse(arguments[0], value, where)
    if dataclasses.is_dataclass(kind):
        hints, content = get_type_hints(kind), parse(dict, value, where)
        for field in dataclasses.fields(kind):
            has_default = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
            if field.name in given or (has_default and content.get(field.name) is None):
                continue
            given[field.name] = member(hints[field.name], content, field.name, where)
        make: Any = kind
        return make(**given)
    if origin is Literal:
        if value not in arguments:
            raise ReportError(f"{where} is {value!r}: one of {', '.join(arguments)} is wanted.")
        return value
    if kind is Shown:
        return _as_text(value)
    type_ = {float: int | float}.get(kind, dict if origin is Mapping else origin or kind)
    is_right = isinstance(value, type_) and not isinstance(value, bool)
    if is_right and kind in (int, float):
        is_right = math.isfinite(value) and (value >= 0 if kind is int else value > 0)
    if not is_right:
        raise ReportError(f"{where} is {_shown(value)}: {_wanted(kind)} is wanted.")
    if origin is Mapping:
        known = {name: one for name, one in value.items() if one is not None}
        return {name: parse(arguments[1], known[name], f"{where}.{name}") for name in known}
    return value


def member(kind: Any, content: Mapping[str, Any], name: str, where: str) -> Any:
    """A member of an object as a `kind`, by `parse`; it must be there."""
    if name not in content:
        raise ReportError(f"{where}.{name} is missing: {_wanted(kind)} is wanted.")
    return parse(kind, content[name], f"{where}.{name}")


def _wanted(kind: Any) -> str:
    return _WANTED.get(kind, "an object")


def _as_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value).replace('"', "")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
