"""Times of several calls taken in turns, their ratios round by round, and the memory they need.

Machines drift, so times are only comparable if they are taken within the same second. Every
round calls every method once, in a new random order, and a speed-up is the ratio of two times of
one round; medians and quartiles are over rounds.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.profiler import profile

ROLES = ("dense", "ours", "baseline", "limit")
FEWEST_ROUNDS = 5
MOST_ROUNDS = 41
COLD_ROUNDS = 7
# A block of calls lasts at least this long, so that the clock and the loop do not count.
_BLOCK_SECONDS = 0.01
# In a call that takes longer, the caches hold no data of the call before it.
_LONG_CALL_SECONDS = 0.05
_FLUSHED_BYTES = 256 << 20
# A size that nothing else is likely to have first and last.
_MARK_BYTES = 4099
_MOST_RECORDINGS = 5


@dataclass(frozen=True)
class Method:
    """One way to do what the methods of a comparison all do.

    Attributes:
        name: Unique in the comparison.
        role: One of `ROLES`. Speed-ups are over the one that is `"dense"`; `"limit"` does nothing
            but the unavoidable work.
        label: For tables.
        call: Does it once. Its time must not depend on what the other methods leave behind.
        period: Calls after which the work repeats: a refresh in every 8th call counts an eighth.
    """

    name: str
    role: str
    label: str
    call: Callable[[], object]
    period: int = 1


class Clock:
    """Wall time of calls on a device. Calls in a row find in the caches what fits there.

    On a GPU that is what the host takes to launch them, where that is longer.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        """Mean time of `calls` calls in a row."""
        self._wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        self._wait()
        return (time.perf_counter() - start) / calls

    def cold_seconds(self, call: Callable[[], object]) -> float:
        """Time of one call after the caches were overwritten."""
        _flush(self.device)
        return self.seconds(call, 1)

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """The most memory that a call holds beyond what was held before, its result included.

        On a CPU every allocation and release of PyTorch's allocator is recorded, those inside
        operators too. What libraries allocate on their own, like the packed panels of a GEMM, is
        not.

        Raises:
            RuntimeError: PyTorch's profiler lost events in every of several recordings.
        """
        if self.device.type == "cuda":
            self._wait()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            self._wait()
            return torch.cuda.max_memory_allocated() - before
        return max(itertools.accumulate(_allocations(call), initial=0))

    def held_bytes(self, call: Callable[[], object]) -> int:
        """What a call allocates and still holds when it returns, its result included.

        Of a forward pass that is what autograd keeps, however it is kept. Counted like
        `peak_bytes`.
        """
        if self.device.type == "cuda":
            self._wait()
            before = torch.cuda.memory_allocated()
            result = call()
            held = torch.cuda.memory_allocated() - before
            del result
            return held
        return sum(_allocations(call))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class EventClock(Clock):
    """Events on the stream, with the second-level cache overwritten before every call."""

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        """Mean time of `calls` calls, each with a cold cache."""
        pairs = []
        for _ in range(calls):
            _flush(self.device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        self._wait()
        milliseconds: float = sum(start.elapsed_time(end) for start, end in pairs)
        return milliseconds / calls / 1e3


def clock_for(device: torch.device, *, with_host: bool = False) -> Clock:
    """The clock of a device; on a GPU `with_host` counts the time that launching takes."""
    return EventClock(device) if device.type == "cuda" and not with_host else Clock(device)


def compare(
    methods: Sequence[Method], clock: Clock, budget: float, *, cold: bool = False
) -> dict[str, dict[str, Any]]:
    """Time `methods` in turns.

    Args:
        methods: Exactly one has the role `"dense"`.
        clock: Of the device that they run on.
        budget: Seconds that the rounds may take; `FEWEST_ROUNDS` are taken in any case. With 0,
            which shows that everything runs, no call is repeated for the clock's sake.
        cold: Also take `COLD_ROUNDS` rounds of single calls with cold caches.

    Returns:
        By name: `role`, `label`, times `ms`, `q1`, `q3` (median and quartiles, milliseconds),
        `speedup` (the same of dense time over this time, per round), `peak_bytes`, `rounds`,
        `calls` (in a block), and with `cold` the first four times of cold rounds under `cold`.

    Raises:
        ValueError: There is no dense method, or two, or two methods share a name.
    """
    names = [method.name for method in methods]
    dense = [method.name for method in methods if method.role == "dense"]
    if len(dense) != 1 or len(set(names)) != len(names):
        raise ValueError(f"methods={names} must have one name each and one dense, not {dense}.")
    least = min(_BLOCK_SECONDS, budget)
    calls = {method.name: _calls_in_a_block(method, clock, least) for method in methods}
    peaks = {method.name: clock.peak_bytes(method.call) for method in methods}
    order = list(methods)
    shuffle = random.Random(0).shuffle
    rounds: list[dict[str, float]] = []
    with _without_collections():
        start = time.perf_counter()
        while len(rounds) < MOST_ROUNDS:
            shuffle(order)
            rounds.append({m.name: _block(m, clock, calls[m.name]) for m in order})
            spent = time.perf_counter() - start
            if len(rounds) >= FEWEST_ROUNDS and spent * (1 + 1 / len(rounds)) > budget:
                break
        cold_rounds = []
        for _ in range(COLD_ROUNDS if cold else 0):
            shuffle(order)
            cold_rounds.append({m.name: clock.cold_seconds(m.call) for m in order})
    results = {}
    for method in methods:
        result: dict[str, Any] = {
            "role": method.role,
            "label": method.label,
            **_times(rounds, method.name, dense[0]),
            "peak_bytes": peaks[method.name],
            "rounds": len(rounds),
            "calls": calls[method.name],
        }
        if cold_rounds:
            result["cold"] = _times(cold_rounds, method.name, dense[0])
        results[method.name] = result
    return results


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """`median`, `q1` and `q3` of two values or more."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "q1": low, "q3": high}


def _times(rounds: list[dict[str, float]], name: str, dense: str) -> dict[str, Any]:
    spread = quartiles([1e3 * times[name] for times in rounds])
    speedup = quartiles([times[dense] / times[name] for times in rounds])
    return {"ms": spread["median"], "q1": spread["q1"], "q3": spread["q3"], "speedup": speedup}


def _calls_in_a_block(method: Method, clock: Clock, least: float) -> int:
    """Warm a method up, and find how many of its calls make a block of `least` seconds."""
    method.call()
    if clock.seconds(method.call, 1) > _LONG_CALL_SECONDS:
        return 1
    once = clock.seconds(method.call, 1)
    periods = max(1, round(least / (once * method.period)))
    return method.period * min(periods, 200)


def _block(method: Method, clock: Clock, calls: int) -> float:
    if calls > 1:
        method.call()
    return clock.seconds(method.call, calls)


def _allocations(call: Callable[[], object]) -> list[int]:
    """Bytes of every allocation on the CPU, and less than 0 of every release, in their order.

    The profiler compares two clocks, and drops what seems to lie outside of the recording; now
    and then that is all. A known allocation before the call and its release after it tell.
    """
    for _ in range(_MOST_RECORDINGS):
        with profile(profile_memory=True) as recorded:
            mark = torch.empty(_MARK_BYTES, dtype=torch.uint8)
            result = call()
            del mark
        results: Any = recorded.kineto_results
        del result  # held until the record ended
        events = [e for e in results.events() if e.name() == "[memory]"]
        found = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]
        if len(found) > 1 and (found[0], found[-1]) == (_MARK_BYTES, -_MARK_BYTES):
            return found[1:-1]
    raise RuntimeError(f"{_MOST_RECORDINGS} recordings of PyTorch's profiler were incomplete.")


def _flush(device: torch.device) -> None:
    """Overwrite more memory than any cache holds."""
    _buffer(device).add_(1)


@functools.cache
def _buffer(device: torch.device) -> torch.Tensor:
    return torch.zeros(_FLUSHED_BYTES // 4, device=device)


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Switch the garbage collector off during timing; reference counts free the tensors."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
