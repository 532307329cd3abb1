"""Errors of the experiments."""

from __future__ import annotations

from memaop_triton.errors import CommandError


class ExperimentError(CommandError):
    """An experiment cannot run."""


class DataError(ExperimentError):
    """A data set is missing or is not what it should be."""
