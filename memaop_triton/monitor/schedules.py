"""Ratios that change in the course of training, stepped like a learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from memaop_triton.nn.layer_choice import converted_layers

#: What a schedule returns: a ratio for all layers, or ratios by name; those not named keep theirs.
Ratios = float | Mapping[str, float]


class RatioScheduler:
    """Sets the ratios of a model's layers by a schedule.

    ``scheduler = RatioScheduler(model, lambda step: 1.0 if step < 500 else 1 / 8)``, then
    `scheduler.step()` after every optimizer step. The ratio of step 0 is set at once.

    Args:
        model: With converted layers. Those that were given `k` have a ratio from then on.
        schedule: `schedule(step)` returns the ratio, in (0, 1], or ratios by layer.

    Raises:
        ValueError: The model has no converted layer, or the schedule returns a ratio out of range
            or names a layer that does not exist.
    """

    def __init__(self, model: nn.Module, schedule: Callable[[int], Ratios]) -> None:
        self._layers = dict(converted_layers(model))
        if not self._layers:
            raise ValueError("model has no converted layer: call convert_(model) first.")
        self.schedule = schedule
        self.last_step = 0
        self._set(schedule(0))

    def step(self) -> None:
        """Count a training step and set the ratios of the next one."""
        self.last_step += 1
        self._set(self.schedule(self.last_step))

    def get_last_ratios(self) -> dict[str, float]:
        """The ratio of every layer by name, NaN for one that has `k` rows."""
        configs = {name: layer.config for name, layer in self._layers.items()}
        return {
            name: config.ratio if isinstance(config.ratio, float | int) else math.nan
            for name, config in configs.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Step and ratios; numbers only."""
        return {"last_step": self.last_step, "ratios": self.get_last_ratios()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another scheduler of the same model stopped.

        Raises:
            ValueError: The state is of a model with other layers.
        """
        if state["ratios"].keys() != self._layers.keys():
            odd = sorted(state["ratios"].keys() ^ self._layers.keys())
            raise ValueError(f"state is of a model with other converted layers: {odd}.")
        self.last_step = state["last_step"]
        self._set({name: r for name, r in state["ratios"].items() if not math.isnan(r)})

    def _set(self, ratios: Ratios) -> None:
        if not isinstance(ratios, Mapping):
            ratios = dict.fromkeys(self._layers, ratios)
        unknown = sorted(ratios.keys() - self._layers.keys())
        if unknown:
            raise ValueError(
                f"schedule names layers that are not converted: {unknown}. There are "
                f"{sorted(self._layers)}."
            )
        for name, ratio in ratios.items():
            if self._layers[name].config.ratio != ratio:
                self._layers[name].set_ratio_(ratio)
