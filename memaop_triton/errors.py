"""Errors that the command line shows as one line."""

from __future__ import annotations

import importlib.util


class CommandError(Exception):
    """A command cannot run; the message names the argument at fault and what would do."""


class MissingExtraError(CommandError):
    """A package of an extra is not installed."""


def require_extra(extra: str, *modules: str) -> None:
    """Raise `MissingExtraError` unless every one of the top-level `modules` is installed."""
    for module in modules:
        try:
            found = importlib.util.find_spec(module) is not None
        except ValueError:  # blocked: its entry in sys.modules is None
            found = False
        if not found:
            raise MissingExtraError(
                f"{module} is not installed: pip install 'memaop-triton[{extra}]' installs it."
            )
