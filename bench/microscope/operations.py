"""The operations of a device that one weight gradient takes, counted without running them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.microscope.report import table
from memaop_triton import MemAOPConfig, Subspace, dispatch, new_memory
from memaop_triton.backward import steps_triton
from memaop_triton.backward.weight_grad import weight_and_bias_grad
from memaop_triton.kernels.draws import NOT_DRAWN
from memaop_triton.kernels.gpu import launch

SETTINGS: dict[str, dict[str, Any]] = {
    "no memory, `priority`": {"memory": "none"},
    "no memory, `topk`": {"selection": "topk", "memory": "none"},
    "no memory, `randk`": {"selection": "randk", "memory": "none"},
    "no memory, `bernoulli`": {"selection": "bernoulli", "memory": "none"},
    "no memory, `crs`": {"selection": "crs", "memory": "none"},
    "no memory, `wta`": {"selection": "wta", "memory": "none"},
    "`residual`, `topk`": {"selection": "topk", "memory": "residual"},
    "`signed`, `weightedk`": {"selection": "weightedk", "memory": "signed"},
    "`residual`, `randk`": {"selection": "randk", "memory": "residual"},
    "the default, of X": {"memory": Subspace(side="input", refresh_every=1 << 20)},
    "the default, of G": {"memory": Subspace(side="grad", refresh_every=1 << 20)},
    "the default, with a refresh": {"memory": Subspace(side="input", refresh_every=1)},
}
INTRODUCTION = """\
## Operations of a step

What one dW with db, bfloat16, 16384 x 1024 x 1024, K/M = 1/8, asks of the device in the middle of
training: launches of these kernels, and operators of PyTorch that are more than room or a view.
"""
_ROOM = ("aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty")


class _Operators(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        if not func.is_view and name not in _ROOM:
            self._found.append(name)
        return func(*args, **(kwargs or {}))


def operations(config: MemAOPConfig, shape: tuple[int, int, int]) -> list[str]:
    """Kernels and operators of the second step, in their order."""
    m, n, p = shape
    found: list[str] = []

    def noted(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        if 0 not in grid:
            found.append(kernel.__name__.removesuffix("_kernel"))

    memory = new_memory(config, n, p)
    x, g = torch.zeros(m, n, dtype=torch.bfloat16), torch.zeros(m, p, dtype=torch.bfloat16)
    with (
        mock.patch.object(launch, "launch", noted),
        mock.patch.object(dispatch, "_obstacle", return_value=""),
        mock.patch.object(dispatch, "draw_seed", return_value=NOT_DRAWN),
        mock.patch.object(steps_triton, "draw_seed", return_value=NOT_DRAWN),
        mock.patch.dict("os.environ", {"MEMAOP_TRITON_BACKEND": "triton"}),
    ):
        weight_and_bias_grad(x, g, config, memory)
        found.clear()
        with _Operators(found):
            weight_and_bias_grad(x, g, config, memory)
    return found


def section() -> str:
    """The table, with its introduction."""
    rows = []
    for name, setting in SETTINGS.items():
        config = MemAOPConfig(ratio=1 / 8, **{"selection": "priority", **setting})
        found = operations(config, (16384, 1024, 1024))
        rows.append((name, str(len(found)), ", ".join(found)))
    return f"{INTRODUCTION}\n{table(('setting', 'operations', 'in their order'), rows)}\n"
