"""Which implementation runs: the choice made by `MEMAOP_TRITON_BACKEND`."""

from __future__ import annotations

import os

_VARIABLE = "MEMAOP_TRITON_BACKEND"


def chosen() -> str:
    """ "torch", "triton", or "" to choose by device.

    Raises:
        ValueError: The variable holds anything else.
    """
    backend = os.environ.get(_VARIABLE, "")
    if backend not in ("", "torch", "triton"):
        raise ValueError(f"{_VARIABLE}={backend!r} is not one of 'torch', 'triton': or unset it.")
    return backend
