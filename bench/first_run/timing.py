"""Times of calls on a GPU, by events on the stream, with cold caches and the host ahead.

Before each call memory is overwritten until the caches hold nothing of the call before, and for as
long as the host needs to launch the call: what is measured is the time of the GPU. The host's time
is measured beside it; where that is longer, it decides.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

Call = Callable[[], object]
_LEAST_OVERWRITTEN = 256 << 20
_MOST_FILLS = 64
_WARM_UP = 3


class Sample(NamedTuple):
    """Microseconds of one call: of the GPU, and of the host that launches it."""

    device: float
    host: float


@dataclass(frozen=True)
class Method:
    """What is timed: a call whose work repeats after `period` of them."""

    name: str
    call: Call
    period: int = 1


class EventTimer:
    """Events of a GPU.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        properties: Any = torch.cuda.get_device_properties(device)
        size = max(_LEAST_OVERWRITTEN, 4 * properties.L2_cache_size)
        self.buffer = torch.empty(size // 4, dtype=torch.int32, device=device)
        self.fill = 1.0
        self.fill = min(self.sample(self.buffer.zero_, 1).device for _ in range(5))

    def fills(self, call: Call) -> int:
        """How often to overwrite the buffer before `call`, which is warmed up."""
        for _ in range(_WARM_UP):
            call()
        host = min(self.sample(call, 1).host for _ in range(_WARM_UP))
        return min(_MOST_FILLS, max(1, math.ceil(1.5 * host / self.fill)))

    def sample(self, call: Call, fills: int) -> Sample:
        """One call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        for _ in range(fills):
            self.buffer.zero_()
        start.record()
        begin = time.perf_counter()
        call()
        host = 1e6 * (time.perf_counter() - begin)
        end.record()
        end.synchronize()
        return Sample(1e3 * start.elapsed_time(end), host)


class WallTimer:
    """The wall clock of a dry run."""

    def fills(self, call: Call) -> int:
        """Nothing is overwritten."""
        call()
        return 0

    def sample(self, call: Call, fills: int) -> Sample:
        """One call."""
        begin = time.perf_counter()
        call()
        wall = 1e6 * (time.perf_counter() - begin)
        return Sample(wall, wall)


def timer_for(device: torch.device) -> EventTimer | WallTimer:
    """The timer of a device."""
    return EventTimer(device) if device.type == "cuda" else WallTimer()


def compare(
    methods: Sequence[Method], timer: EventTimer | WallTimer, rounds: int
) -> dict[str, dict[str, float]]:
    """Time `methods` in turns.

    Returns:
        By name `us`, `q1`, `q3`: median and quartiles over rounds, in microseconds, of a call's
        mean over its period; and `host_us`.
    """
    fills = {method.name: timer.fills(method.call) for method in methods}
    taken: dict[str, list[Sample]] = {method.name: [] for method in methods}
    for _ in range(rounds):
        for method in methods:
            made = [timer.sample(method.call, fills[method.name]) for _ in range(method.period)]
            means = (statistics.fmean(times) for times in zip(*made, strict=True))
            taken[method.name].append(Sample(*means))
    return {name: _figures(samples) for name, samples in taken.items()}


def _figures(samples: list[Sample]) -> dict[str, float]:
    low, middle, high = statistics.quantiles([one.device for one in samples], n=4)
    host = statistics.median(one.host for one in samples)
    return {"us": middle, "q1": low, "q3": high, "host_us": host}


def kernels_of(call: Call, device: torch.device, calls: int) -> list[dict[str, Any]]:
    """What one call launches on average, by the profiler: names, times and numbers of launches.

    Nothing where the profiler is not allowed to look.
    """
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    try:
        with profile(activities=[activity]) as recorded:
            for _ in range(calls):
                call()
            if on_gpu:
                torch.cuda.synchronize(device)
        found: Any = recorded.key_averages()
    except RuntimeError as error:
        print(f"the profiler does not run: {error}", flush=True)
        return []
    made = []
    for one in found:
        total = one.self_device_time_total if on_gpu else one.self_cpu_time_total
        if total:
            us = round(total / calls, 2)
            made.append({"kernel": one.key[:80], "us": us, "launches": one.count / calls})
    return sorted(made, key=lambda one: -float(one["us"]))[:24]
