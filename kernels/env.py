"""The environment variables that choose the implementation and the folder of cached files."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

_BACKEND = "MEMAOP_TRITON_BACKEND"
_CACHE_DIR = "MEMAOP_TRITON_CACHE_DIR"


def backend() -> str:
    """ "torch", "triton", or "" to choose by device.

    Raises:
        ValueError: `MEMAOP_TRITON_BACKEND` holds anything else.
    """
    name = os.environ.get(_BACKEND, "")
    if name not in ("", "torch", "triton"):
        raise ValueError(f"{_BACKEND}={name!r} is not one of 'torch', 'triton': or unset it.")
    return name


def cache_folder(part: str) -> Path:
    """The folder `part` of `$MEMAOP_TRITON_CACHE_DIR`, or of the user's cache; may not exist."""
    chosen = os.environ.get(_CACHE_DIR)
    return (Path(chosen) if chosen else platformdirs.user_cache_path("memaop-triton")) / part
