"""Errors that the command line shows as one line."""

from __future__ import annotations

import importlib.util

from memaop_triton.errors import CommandError


class ExperimentError(CommandError):
    """An experiment cannot run."""


class DataError(ExperimentError):
    """A data set is missing or is not what it should be."""


class MissingExtraError(ExperimentError):
    """A package of the extra `demo` is not installed."""


def require_extra(*modules: str) -> None:
    """Raise `MissingExtraError` unless every one of the top-level `modules` is installed."""
    for module in modules:
        try:
            found = importlib.util.find_spec(module) is not None
        except ValueError:  # blocked: its entry in sys.modules is None
            found = False
        if not found:
            raise MissingExtraError(
                f"{module} is not installed: pip install 'memaop-triton[demo]' brings it."
            )
