"""What observed steps and clocks have shown of the layers of one model, to all processes."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from memaop_triton.auto.agreement import Processes, SeenByAll
from memaop_triton.auto.observing import Seen, StepObserver
from memaop_triton.auto.savings import Savings
from memaop_triton.auto.worth import EXACT, Layer, Worth, progress_of
from memaop_triton.config import MemAOPConfig
from memaop_triton.monitor.hull import Option

#: K/M that a layer may get.
SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
#: Steps that a decision is based on, evenly spaced: noise changes as training goes on.
LOOKS = 4

_OPTIONS = (EXACT, *SHARES)
_FEWEST_TIMES = 3
# One-sided 90 % quantiles of Student's t for one degree of freedom, two, and so on.
_STUDENT = (3.078, 1.886, 1.638)


class Evidence:
    """Of all layers the newest observations, and the times of their options.

    Args:
        processes: Those that decide alike.

    Attributes:
        seen: Observations by layer, the newest one last.
        configs: By layer and K/M. One object for each, because what is recorded of a step belongs
            to its configuration.
        seconds: By layer and K/M, of the weight gradients in a step, as they were at the last
            decision; NaN where they are not known.
    """

    def __init__(self, processes: Processes) -> None:
        self.seen: dict[str, deque[Seen | SeenByAll]] = {}
        self.configs: dict[str, dict[float, MemAOPConfig]] = {}
        self.seconds: dict[str, dict[float, float]] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        self._processes = processes
        self._savings = Savings()

    def add_layer(self, name: str, config: MemAOPConfig, shape: tuple[int, int]) -> None:
        """A layer that nothing is known of; `shape` is that of its gradient, mostly P and N."""
        self.seen[name] = deque(maxlen=LOOKS)
        self.configs[name] = {share: config.spending(ratio=share) for share in _OPTIONS}
        self.seconds[name] = dict.fromkeys(_OPTIONS, math.nan)
        self._shapes[name] = shape

    def description(self) -> str:
        """Layers, shapes and configurations, for a comparison."""
        return repr((self._shapes, {name: found[EXACT] for name, found in self.configs.items()}))

    def read(
        self, observers: Mapping[str, StepObserver], copies: int, device: torch.device
    ) -> None:
        """Take what a step showed that is finite; arguments as for `Processes.seen`."""
        found = self._processes.seen(observers, self._shapes, SHARES, copies, device)
        for name, seen in found.items():
            if seen is not None and seen.is_finite:
                self.seen[name].append(seen)
                observers[name].tell(seen)

    def time(
        self,
        names: Collection[str],
        exact: Sequence[float],
        observed: float,
        device: torch.device,
    ) -> tuple[float, float]:
        """Time the options of layers, and return the seconds of an exact and of an observed step.

        Means over the processes; NaN if one of them knows too little.

        Args:
            names: Of layers.
            exact: Seconds of exact steps.
            observed: Seconds of an observed step.
            device: Of the layers.
        """
        measured = self._agreed(lambda: self._measured(names, exact, observed), device)
        of_exact, of_observed, *seconds = measured
        for number, name in enumerate(self.seen):
            of_layer = seconds[number * len(_OPTIONS) : (number + 1) * len(_OPTIONS)]
            self.seconds[name] = dict(zip(_OPTIONS, of_layer, strict=True))
        return of_exact, of_observed

    def _measured(
        self, names: Collection[str], exact: Sequence[float], observed: float
    ) -> list[float]:
        if len(exact) < _FEWEST_TIMES:
            return self._nothing()
        numbers = [statistics.median(exact), observed]
        for name, seen in self.seen.items():
            is_known = name in names and bool(seen)
            seconds = self._savings.seconds(seen[-1].uses, self.configs[name]) if is_known else {}
            numbers += [seconds.get(share, math.nan) for share in _OPTIONS]
        return numbers

    def _agreed(self, measure: Callable[[], list[float]], device: torch.device) -> list[float]:
        try:
            numbers = measure()
        except Exception:  # raised again, once the others, which wait for this process, know
            self._processes.mean(self._nothing(), device)
            raise
        return self._processes.mean(numbers, device)

    def _nothing(self) -> list[float]:
        return [math.nan] * (2 + len(self.seen) * len(_OPTIONS))

    def layers(self) -> dict[str, Layer]:
        """Of those layers that were seen and timed in all processes."""
        known = {name: seconds for name, seconds in self.seconds.items() if self.seen[name]}
        return {
            name: layer_of(self.seen[name], seconds)
            for name, seconds in known.items()
            if not math.isnan(sum(seconds.values()))
        }

    def cautious_progress(self, worth: Worth) -> float:
        """Progress per second at the upper end of a 90 % interval of the noise."""
        looks = min(len(self.seen[name]) for name in worth.shares)
        noises = []
        for look in range(1, looks + 1):
            ones = {name: self.seen[name][-look] for name in worth.shares}
            square = sum(one.square for one in ones.values())
            sampled = {name: share for name, share in worth.shares.items() if share < EXACT}
            variance = sum(ones[name].variance_of(share) for name, share in sampled.items())
            noises.append(variance / square if square > 0 else math.inf)
        if worth.noise == 0:
            return worth.progress
        if looks < 2:
            return 0.0
        error = statistics.stdev(noises) / math.sqrt(looks)
        return worth.speedup * progress_of(statistics.fmean(noises) + _STUDENT[looks - 2] * error)


def layer_of(seen: Collection[Seen | SeenByAll], seconds: Mapping[float, float]) -> Layer:
    """What observations of a layer and the seconds of its options, by K/M, come to."""
    options = [
        Option(share, cost, statistics.fmean(one.variance_of(share) for one in seen))
        for share, cost in seconds.items()
    ]
    return Layer(options, statistics.fmean(one.square for one in seen))
