"""Steps of the Triton kernels that are launched again as they were recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memaop_triton.backward.step import Operands
from memaop_triton.kernels import env
from memaop_triton.kernels.gpu import launch
from memaop_triton.kernels.tuning import tuner

_MOST = 1024  # recordings that are kept
_ATTEMPTS = 4  # at a recording: the first call of a shape may tune

#: The recording of a step, or how often there was none; the configuration, so that its id stays.
_recordings: dict[tuple[Any, ...], tuple[launch.Recording | int, Any]] = {}


def repeated(
    name: str,
    operands: Operands,
    function: Callable[[], tuple[Tensor | None, ...]],
    tensors: tuple[Tensor, ...],
    scalars: tuple[tuple[str, Any], ...],
) -> Any:
    """What `function` returns, by a recording of an earlier call on such operands.

    Args:
        name: Of the function: two of one name do the same with the same operands.
        operands: What the step works on.
        function: As `launch.record` takes it.
        tensors: All tensors that the function takes.
        scalars: What may differ between calls besides, numbers or tensors: see `launch.record`.
    """
    x = operands.x
    key = (
        name,
        id(operands.config),
        operands.k,
        operands.bias_grad,
        x.device,
        tuner.version(),
        x.dtype == torch.float32 and env.allows_tf32(),
        *[(a.dtype, a.shape, a.stride(), a.data_ptr() & 15) for a in tensors],
    )
    found, _ = _recordings.get(key, (0, None))
    if isinstance(found, launch.Recording):
        return found(tensors, tuple(value for _, value in scalars))
    is_fixed = any(isinstance(value, Tensor) for _, value in scalars)  # in the capture of a graph
    if is_fixed or found == _ATTEMPTS:
        return function()
    results, recording = launch.record(function, tensors, scalars)
    if len(_recordings) >= _MOST:
        _recordings.clear()
    _recordings[key] = (found + 1 if recording is None else recording, operands.config)
    return results


def forget() -> None:
    """Forget all recordings."""
    _recordings.clear()
