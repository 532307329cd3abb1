"""The time of a launch on a GPU with cold caches, which is how training finds them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch

FIRST, LEAST, MOST = 3, 7, 50
BUDGET_MS = 30.0
GIVE_UP = 1.5


def time_candidate(
    call: Callable[[], object], device: torch.device, best_ms: float = math.inf
) -> float:
    """Median milliseconds of `call` on the current stream, by events, after one call to warm up.

    Before each call a buffer larger than the second-level cache is overwritten. That also keeps the
    GPU busy while the call is being launched, so that what the host needs for it does not count.
    A call is repeated for 30 ms, 7 to 50 times.

    Args:
        call: Launches what is timed.
        device: A GPU.
        best_ms: Time of the best so far. A call that takes half as long again three times in a row
            is not repeated further.
    """
    with torch.cuda.device(device):
        call()
        torch.cuda.synchronize()  # what else the GPU was doing is not timed along
        flush = torch.empty(_flush_bytes(device), dtype=torch.uint8, device=device)
        times = _cold_times(call, flush, FIRST)
        if min(times) > GIVE_UP * best_ms:
            return statistics.median(times)
        repetitions = BUDGET_MS / max(statistics.median(times), 1e-3)
        times = _cold_times(call, flush, max(LEAST, min(MOST, int(repetitions))))
        return statistics.median(times)


def _flush_bytes(device: torch.device) -> int:
    """Several times the second-level cache; at 3 TB/s the least takes 43 microseconds."""
    return max(128 << 20, 4 * torch.cuda.get_device_properties(device).L2_cache_size)


def _cold_times(call: Callable[[], object], flush: torch.Tensor, repetitions: int) -> list[float]:
    marks = []
    for _ in range(repetitions):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in marks]
