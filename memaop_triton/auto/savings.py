"""Seconds of a layer's gradients under its options, timed at the shapes of the run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping

from memaop_triton.auto.layer_timing import Use, measure_each
from memaop_triton.auto.timing import generators_restored
from memaop_triton.config import MemAOPConfig

# Seconds that the calls of one shape are timed for, about, and each call at least. A trial follows.
_BUDGET = 0.02
_SHORTEST = 0.5e-3


class Savings:
    """Times of weight gradients by K/M, each measured once; layers of one shape share them."""

    def __init__(self) -> None:
        self._times: dict[tuple[Use, MemAOPConfig], dict[float, float]] = {}

    def seconds(
        self, uses: Iterable[Use], configs: Mapping[float, MemAOPConfig]
    ) -> dict[float, float]:
        """Of all passes of a layer in a step.

        Args:
            uses: The passes.
            configs: Of the layer by K/M; 1 is dense.
        """
        total = dict.fromkeys(configs, 0.0)
        for use in uses:
            for share, seconds in self._of(use, configs).items():
                total[share] += seconds
        return total

    def _of(self, use: Use, configs: Mapping[float, MemAOPConfig]) -> dict[float, float]:
        key = (use, configs[1.0])  # the others differ in the rows only
        if key not in self._times:
            self._times[key] = self._measured(use, configs)
        return self._times[key]

    def _measured(self, use: Use, configs: Mapping[float, MemAOPConfig]) -> dict[float, float]:
        sampled = {share: config for share, config in configs.items() if share < 1}
        with generators_restored([use.device]):
            exact = configs[1.0] if configs[1.0].stash != "exact" else None
            found = measure_each(use, list(sampled.values()), _BUDGET, _SHORTEST, exact)
        times = {1.0: statistics.median(found[0].dense)}
        for share, one in zip(sampled, found, strict=True):
            times[share] = statistics.median(one.ours)
        return times
