"""Seconds between two steps of an optimizer, as the device takes them."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque

import torch

_KEPT = 32  # intervals of one kind
_MOST_MEDIANS = 2  # that an interval counts for


class StepClock:
    """Intervals between the ends of steps, by what kind of step they were.

    On a GPU they are measured by events on its current stream and are read once they have passed,
    without a synchronisation: what a step takes is what the device takes for it, if the host is
    ahead.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: float | torch.cuda.Event | None = None
        self._waiting: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds: dict[str, deque[float]] = {}

    def tick(self, kind: str | None) -> None:
        """A step has ended; `None` if its time is of no use."""
        last, self._last = self._last, self._now()
        if last is None or kind is None:
            return
        if isinstance(last, float):
            assert isinstance(self._last, float)
            self._add(kind, self._last - last)
        else:
            assert not isinstance(self._last, float)
            self._waiting.append((kind, last, self._last))

    def seconds(self, kind: str) -> list[float]:
        """The newest intervals of a kind, those that have passed on the device."""
        while self._waiting and self._waiting[0][2].query():
            waited, start, end = self._waiting.popleft()
            self._add(waited, start.elapsed_time(end) / 1e3)
        return list(self._seconds.get(kind, ()))

    def median(self, kind: str) -> float:
        """Of these; evaluations and other breaks between two steps do not move it. NaN of none."""
        return statistics.median(self.seconds(kind) or [math.nan])

    def mean(self, kind: str) -> float:
        """Of these, none of which counts for more than two medians; NaN of none.

        So a refresh counts, and an evaluation or another break between two steps hardly.
        """
        seconds = self.seconds(kind)
        if not seconds:
            return math.nan
        most = _MOST_MEDIANS * statistics.median(seconds)
        return statistics.fmean(min(one, most) for one in seconds)

    def forget(self, kind: str) -> None:
        """Drop the intervals of a kind."""
        self._waiting = deque(entry for entry in self._waiting if entry[0] != kind)
        self._seconds.pop(kind, None)

    def _add(self, kind: str, seconds: float) -> None:
        self._seconds.setdefault(kind, deque(maxlen=_KEPT)).append(seconds)

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
