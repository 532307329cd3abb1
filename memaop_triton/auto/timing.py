"""Times of calls that are compared with each other, on the device that they run on."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

#: Shorter calls are repeated until they take this long, so that the clock's resolution and single
#: delays matter less.
SHORTEST_SECONDS = 2e-3
MOST_REPEATS = 500
FEWEST_ROUNDS = 3
MOST_ROUNDS = 25


def elapsed(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Seconds of one call, the mean of `repeats` calls in a row.

    On a GPU by events on its current stream, with a synchronisation at the end.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3 / repeats
    before = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - before) / repeats


def time_in_turn(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    budget: float,
    shortest: float = SHORTEST_SECONDS,
) -> list[list[float]]:
    """Times of several calls, taken in turn, so that drifts in speed affect all alike.

    Args:
        calls: What to time. Each is called before, so that work done on first use is not timed.
        device: Where the work is done.
        budget: Seconds to spend, about. There are at least three rounds, however long they take.
        shortest: Seconds that shorter calls are repeated for.

    Returns:
        For each call its seconds in every round.
    """
    for call in calls:
        elapsed(call, device)
    # One time is too inaccurate to say how often a short call has to be repeated.
    guesses = [min(elapsed(call, device) for _ in range(2)) for call in calls]
    repeats = [
        min(MOST_REPEATS, max(1, math.ceil(shortest / max(guess, 1e-9)))) for guess in guesses
    ]
    one_round = sum(guess * count for guess, count in zip(guesses, repeats, strict=True))
    rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(budget / max(one_round, 1e-9))))
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds):
        order = list(range(len(calls)))
        # The order changes, so that no call always follows the same other call and finds its data
        # in the cache.
        for i in order if number % 2 == 0 else reversed(order):
            times[i].append(elapsed(calls[i], device, repeats[i]))
    return times


@contextlib.contextmanager
def generators_restored(devices: Iterable[torch.device]) -> Iterator[None]:
    """Put the default generators of Python, NumPy, torch and of these devices back afterwards."""
    gpus = {device.index for device in devices if device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(gpus)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
