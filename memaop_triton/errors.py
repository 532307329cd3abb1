"""Errors that the command line shows as one line, and checks of arguments."""

from __future__ import annotations

import difflib
import importlib.util
import numbers
from collections.abc import Iterable
from typing import TypeGuard


class CommandError(Exception):
    """A command cannot run; the message names the argument at fault and what would do."""


def require_extra(extra: str, *modules: str) -> None:
    """Raise `CommandError` unless every one of the top-level `modules` is installed."""
    for module in modules:
        try:
            found = importlib.util.find_spec(module) is not None
        except ValueError:  # blocked: its entry in sys.modules is None
            found = False
        if not found:
            raise CommandError(
                f"{module} is not installed: pip install 'memaop-triton[{extra}]' installs it."
            )


def check_name(argument: str, value: object, allowed: Iterable[str]) -> None:
    """Raise `ValueError` unless `value` is one of `allowed`, and suggest the nearest name."""
    names = tuple(allowed)
    if value in names:
        return
    near = difflib.get_close_matches(str(value).lower(), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{argument}={value!r} is not one of {', '.join(map(repr, names))}.{hint}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a real number, which a bool is not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_count(argument: str, value: object, what: str) -> None:
    """Raise `TypeError` unless `value` is an int, and `ValueError` if it is below 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{argument} must be an int ({what}), got {value!r}.")
    if int(value) < 1:
        raise ValueError(f"{argument}={value} must be at least 1 ({what}).")


def check_fraction(argument: str, value: object, meaning: str) -> None:
    """Raise `TypeError` unless `value` is a number, and `ValueError` unless it is in (0, 1]."""
    if not is_number(value):
        raise TypeError(f"{argument} must be a number in (0, 1], got {value!r}.")
    if not 0 < value <= 1:
        raise ValueError(f"{argument}={value} must be in (0, 1]: {meaning}.")
