"""Functions that only launch kernels: they are recorded once, and launched again from then on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memaop_triton.kernels import env
from memaop_triton.kernels.gpu import launch
from memaop_triton.kernels.tuning import tuner

_MOST = 1024  # recordings that are kept
_ATTEMPTS = 4  # at a recording: the first call of a shape may tune

#: The recording of a function, or how often there was none; with what its key names by an id.
_recordings: dict[tuple[Any, ...], tuple[launch.Recording | int, Any]] = {}


def repeated(
    what: tuple[Any, ...],
    function: Callable[[], tuple[Tensor | None, ...]],
    tensors: tuple[Tensor, ...],
    scalars: tuple[tuple[str, Any], ...] = (),
    keeps: Any = None,
) -> Any:
    """What `function` returns, by a recording of an earlier call on such tensors.

    Args:
        what: Says what the function does: two of one `what` do the same with the same tensors.
        function: As `launch.record` takes it.
        tensors: All tensors that the function takes.
        scalars: What may differ between calls besides, numbers or tensors: see `launch.record`.
        keeps: An object whose id is in `what`, and must stay its own.
    """
    if launch.is_recording():  # as a part of something larger
        return function()
    x = tensors[0]
    key = (
        what,
        x.device,
        tuner.version(),
        x.dtype == torch.float32 and env.allows_tf32(),
        *[(a.dtype, a.shape, a.stride(), a.data_ptr() & 15) for a in tensors],
    )
    found, _ = _recordings.get(key, (0, None))
    if isinstance(found, launch.Recording):
        return found(tensors, [value for _, value in scalars])
    is_fixed = any(isinstance(value, Tensor) for _, value in scalars)  # in the capture of a graph
    if is_fixed or found == _ATTEMPTS:
        return function()
    results, recording = launch.record(function, tensors, scalars)
    if len(_recordings) >= _MOST:
        _recordings.clear()
    _recordings[key] = (found + 1 if recording is None else recording, keeps)
    return results


def forget() -> None:
    """Forget all recordings."""
    _recordings.clear()
