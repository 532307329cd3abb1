"""Counting the steps of the optimizer that trains a model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


class OptimizerSteps:
    """Calls back after every step of the optimizer that holds a certain weight.

    Args:
        weight: That weight now; parallel wrappers exchange it. `None` if there is none.
        callback: What is called, as long as this object lives.
    """

    def __init__(self, weight: Callable[[], Tensor | None], callback: Callable[[], None]) -> None:
        self._weight, self._callback = weight, callback
        self._holds: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        self._counted: Callable[[], Any] = lambda: None
        self._last: Callable[[], Any] = lambda: None
        _listeners.add(self)
        _listen()

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after the step of any optimizer."""
        holds = self._holds.get(optimizer)
        if holds is None:
            holds = self._holds[optimizer] = self._is_held_by(optimizer)
        if not holds:
            return
        # The step of an optimizer may consist of one of another, in some processes of a run only
        # (`ZeroRedundancyOptimizer`). A new one is counted from its second step in a row on.
        is_repeated = self._last() is optimizer
        self._last = weakref.ref(optimizer)
        if is_repeated or self._counted() is None:
            self._counted = self._last
        if self._counted() is optimizer:
            self._callback()

    def _is_held_by(self, optimizer: torch.optim.Optimizer) -> bool:
        weight = self._weight()
        groups = optimizer.param_groups
        return any(parameter is weight for group in groups for parameter in group["params"])


_listeners: weakref.WeakSet[OptimizerSteps] = weakref.WeakSet()
_handle: Any = None


def _listen() -> None:
    global _handle
    if _handle is None:
        _handle = register_optimizer_step_post_hook(_stepped)


def _stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for listener in list(_listeners):
        listener.stepped(optimizer)
