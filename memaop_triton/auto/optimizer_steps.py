"""Counting the steps of the optimizer that trains a model."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


class OptimizerSteps:
    """Calls back after every step of the optimizer that holds a certain weight.

    Where a step consists of one of another optimizer, in some processes of a run only as with
    `ZeroRedundancyOptimizer`, it is the end of the outer one.

    Args:
        weight: That weight now; parallel wrappers exchange it. `None` if there is none.
        callback: What is called, as long as this object lives.
    """

    def __init__(self, weight: Callable[[], Tensor | None], callback: Callable[[], None]) -> None:
        self._weight, self._callback = weight, callback
        self._holds: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        self._is_due = False
        _listeners.add(self)
        _listen()

    def stepped(self, optimizer: torch.optim.Optimizer, is_outermost: bool) -> None:
        """Called after the step of any optimizer."""
        holds = self._holds.get(optimizer)
        if holds is None:
            holds = self._holds[optimizer] = self._is_held_by(optimizer)
        self._is_due = self._is_due or holds
        if self._is_due and is_outermost:
            self._is_due = False
            self._callback()

    def _is_held_by(self, optimizer: torch.optim.Optimizer) -> bool:
        weight = self._weight()
        groups = optimizer.param_groups
        return any(parameter is weight for group in groups for parameter in group["params"])


class _Running(threading.local):
    """Optimizers whose steps have begun in this thread, the outermost first."""

    def __init__(self) -> None:
        self.optimizers: list[weakref.ref[Any]] = []

    def end(self, optimizer: torch.optim.Optimizer) -> None:
        """Of the step of this one and of those inside of it, also if an error ended it before."""
        running = [one for one in self.optimizers if one() is not None]
        inside = [number for number, one in enumerate(running) if one() is optimizer]
        self.optimizers = running[: inside[0]] if inside else running


_running = _Running()
_listeners: weakref.WeakSet[OptimizerSteps] = weakref.WeakSet()
_handles: list[Any] = []


def _listen() -> None:
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_begins))
        _handles.append(register_optimizer_step_post_hook(_ends))


def _begins(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    _running.end(optimizer)
    _running.optimizers.append(weakref.ref(optimizer))


def _ends(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    _running.end(optimizer)
    for listener in list(_listeners):
        listener.stepped(optimizer, is_outermost=not _running.optimizers)
