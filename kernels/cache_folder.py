"""Where this package keeps what it made for a machine: compiled row passes and tuned configs."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

_VARIABLE = "MEMAOP_TRITON_CACHE_DIR"


def cache_folder(part: str) -> Path:
    """The folder `part` of `$MEMAOP_TRITON_CACHE_DIR`, or of the user's cache; may not exist."""
    chosen = os.environ.get(_VARIABLE)
    return (Path(chosen) if chosen else platformdirs.user_cache_path("memaop-triton")) / part
