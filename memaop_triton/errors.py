"""Errors that the command line shows as one line, and the check of a name."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable


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
