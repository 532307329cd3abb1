"""Ratios that change in the course of training, stepped like a learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from memaop_triton.monitor.allocate import DEFAULT_RATIOS
from memaop_triton.monitor.diagnostics import LayerDiagnostics
from memaop_triton.monitor.monitor import Monitor
from memaop_triton.nn.layer_choice import converted_layers

#: What a schedule returns: a ratio for all layers, or ratios by name; those not named keep theirs.
Ratios = float | Mapping[str, float]
#: `schedule(step)`, or `schedule(step, diagnostics)` for a scheduler with a monitor.
Schedule = Callable[..., Ratios]


class RatioScheduler:
    """Sets the ratios of a model's layers by a schedule.

    ``scheduler = RatioScheduler(model, dense_warmup(500, 1 / 8))``, then `scheduler.step()` after
    every optimizer step. The ratio of step 0 is set at once.

    Args:
        model: With converted layers. Those that were given `k` have a ratio from then on.
        schedule: `dense_warmup`, `growing`, `VarianceControl`, or any callable: `schedule(step)`,
            and with a monitor `schedule(step, diagnostics)` where `diagnostics` are those of
            `Monitor.read` by name, empty before the first observation. It returns the ratio, in
            (0, 1], or ratios by layer.
        monitor: Of the same model, for a schedule that wants diagnostics.
        every: Steps from one call of the schedule to the next. With a monitor every call waits for
            the device.

    Raises:
        ValueError: The model has no converted layer, `every` is below 1, or the schedule returns a
            ratio out of range or names a layer that there is not.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        monitor: Monitor | None = None,
        *,
        every: int = 1,
    ) -> None:
        self._layers = dict(converted_layers(model))
        if not self._layers:
            raise ValueError("model has no converted layer: call convert_(model) first.")
        if every < 1:
            raise ValueError(f"every={every} must be at least 1: steps between two updates.")
        self.schedule = schedule
        self.monitor = monitor
        self.every = every
        self.last_step = 0
        self._apply()

    def step(self) -> None:
        """Count a training step, and set the ratios if they are due."""
        self.last_step += 1
        if self.last_step % self.every == 0:
            self._apply()

    def get_last_ratios(self) -> dict[str, float]:
        """The ratio of every layer by name, NaN for one that has `k` rows."""
        configs = {name: layer.config for name, layer in self._layers.items()}
        return {
            name: math.nan if config.ratio is None else config.ratio
            for name, config in configs.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Step, ratios, and the state of a schedule that has a `state_dict`; numbers only."""
        state: dict[str, Any] = {"last_step": self.last_step, "ratios": self.get_last_ratios()}
        if hasattr(self.schedule, "state_dict"):
            state["schedule"] = self.schedule.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another scheduler of the same model was.

        Raises:
            ValueError: The state is of a model with other layers.
        """
        if state["ratios"].keys() != self._layers.keys():
            odd = sorted(state["ratios"].keys() ^ self._layers.keys())
            raise ValueError(f"state is of a model with other converted layers: {odd}.")
        self.last_step = state["last_step"]
        self._set({name: r for name, r in state["ratios"].items() if not math.isnan(r)})
        if hasattr(self.schedule, "load_state_dict"):
            self.schedule.load_state_dict(state["schedule"])

    def _apply(self) -> None:
        seen = () if self.monitor is None else (self.monitor.read(),)
        self._set(self.schedule(self.last_step, *seen))

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


def dense_warmup(steps: int, then: float | Schedule) -> Schedule:
    """All rows for so many steps, then a ratio, or a schedule that starts there at its step 0.

    The first steps of a training move the weights furthest, and gradients then agree least.

    Raises:
        ValueError: `steps` is negative.
    """
    if steps < 0:
        raise ValueError(f"steps={steps} must not be negative.")

    def ratio(step: int, *seen: Mapping[str, LayerDiagnostics]) -> Ratios:
        if step < steps:
            return 1.0
        return then(step - steps, *seen) if callable(then) else then

    return ratio


def growing(start: float, end: float, steps: int) -> Schedule:
    """From `start` to `end` in `steps` steps, doubling at equal intervals.

    Early gradients are large beside their noise, late ones are not. Doublings keep the number of
    sizes that are met small.

    Raises:
        ValueError: Not 0 < start ≤ end ≤ 1, or `steps` is below 1.
    """
    if not 0 < start <= end <= 1:
        raise ValueError(f"start={start} and end={end} must be 0 < start ≤ end ≤ 1.")
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1.")
    doublings = math.ceil(math.log2(end / start) - 1e-9)

    def ratio(step: int, *_: Mapping[str, LayerDiagnostics]) -> float:
        done = min(step, steps) * doublings // steps
        return end if done == doublings else start * 2.0**done

    return ratio


class VarianceControl:
    """Keeps every layer's sampling variance near a fraction of its batch's own.

    The rule of VCAS (Wang, Chen, Zhu, "Efficient Backpropagation with Variance-Controlled Adaptive
    Sampling", ICLR 2024, arXiv 2402.17227): a layer whose variance is above the target has its
    ratio multiplied by 1/`factor`, one below it by `factor`. VCAS measures both variances by
    repeated backward passes; here the monitor has them from the passes of the training. The ratio
    that a layer gets is the next of the list upwards.

    For `RatioScheduler(model, VarianceControl(0.25), monitor, every=100)`. Between two updates the
    monitor should see the layer a few times. Layers whose policy is biased have no sampling
    variance and keep their ratios.

    Args:
        target: Of `LayerDiagnostics.relative_variance`: at v a step is worth one with 1/(1+v) of
            the batch.
        factor: In (0, 1); VCAS's β.
        ratios: To choose from.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self, target: float, *, factor: float = 0.95, ratios: Sequence[float] = DEFAULT_RATIOS
    ) -> None:
        if not target > 0:
            raise ValueError(f"target={target} must be above 0: sampling over batch variance.")
        if not 0 < factor < 1:
            raise ValueError(f"factor={factor} must be in (0, 1): what an update multiplies by.")
        if not ratios or not all(0 < ratio <= 1 for ratio in ratios):
            raise ValueError(f"ratios={ratios} must be one or more numbers in (0, 1].")
        self.target = target
        self.factor = factor
        self.ratios = tuple(sorted(ratios))
        self._unrounded: dict[str, float] = {}

    def __call__(self, step: int, diagnostics: Mapping[str, LayerDiagnostics]) -> dict[str, float]:
        """The layers' next ratios, from the diagnostics of `Monitor.read`."""
        return {
            name: self._next(name, seen)
            for name, seen in diagnostics.items()
            if not math.isnan(seen.relative_variance)
        }

    def state_dict(self) -> dict[str, float]:
        """The ratios before they are rounded to the list, by layer."""
        return dict(self._unrounded)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a saved state."""
        self._unrounded = dict(state)

    def _next(self, name: str, seen: LayerDiagnostics) -> float:
        wanted = self._unrounded.get(name, seen.ratio)
        is_noisy = seen.relative_variance > self.target
        wanted = wanted / self.factor if is_noisy else wanted * self.factor
        wanted = min(max(wanted, self.ratios[0]), self.ratios[-1])
        self._unrounded[name] = wanted
        return next(ratio for ratio in self.ratios if ratio >= wanted)
