"""Seconds of a layer's gradients under its options, timed at the shapes of the run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from memaop_triton.config import MemAOPConfig
from memaop_triton.plan.layer_timing import Use, measure
from memaop_triton.plan.observing import generators_restored

# Seconds that the calls of one shape and configuration are timed for, about.
_BUDGET = 0.03


class Savings:
    """Times of weight gradients, each measured once; layers of one shape share them."""

    def __init__(self) -> None:
        self._times: dict[tuple[Use, MemAOPConfig], tuple[float, float]] = {}

    def seconds(self, uses: Iterable[Use], config: MemAOPConfig) -> float:
        """Of all passes of a layer in a step, under `config`; dense's where that is faster."""
        return sum(min(self._measured(use, config)) for use in uses)

    def dense_seconds(self, uses: Iterable[Use], config: MemAOPConfig) -> float:
        """Of the same passes by `nn.Linear`, measured beside those of `config`."""
        return sum(self._measured(use, config)[0] for use in uses)

    def _measured(self, use: Use, config: MemAOPConfig) -> tuple[float, float]:
        """Of dense and of `config`: as much faster than dense as it was in the same rounds."""
        key = (use, config)
        if key not in self._times:
            with generators_restored([use.device]):
                found = measure(use, config, _BUDGET)
            dense, ours = statistics.median(found.dense), statistics.median(found.ours)
            # Dense's time of a shape is one number, whatever it was measured beside.
            first = next((d for (u, _), (d, _) in self._times.items() if u == use), dense)
            self._times[key] = first, ours * first / dense
        return self._times[key]
