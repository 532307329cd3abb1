"""Checks of what a memory is loaded from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def check_fields(kind: str, state: Mapping[str, Any], *names: str) -> None:
    """Raise `ValueError` unless `state` is of this kind and has these entries."""
    if state.get("kind") != kind:
        raise ValueError(f"state is of a {state.get('kind')!r} memory, this one is {kind!r}.")
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"state lacks {', '.join(missing)}: it is not a complete memory.")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` unless `tensor` has this shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, this memory needs {shape}.")
