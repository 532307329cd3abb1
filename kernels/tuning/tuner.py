"""Which configuration a launch gets, and the search for the best one.

    the caller's → chosen in this process → the user's cache → shipped → tuning → the heuristic

| `MEMAOP_TRITON_AUTOTUNE` | |
|---|---|
| `first-use` (or unset) | a problem without an entry in a file is tuned at its first launch |
| `off` | nothing is tuned; files and the heuristic choose |
| `force` | every problem is tuned at its first launch in a process, also if a file has an entry |

Nothing is tuned on a CPU (Triton's interpreter); while a CUDA graph is captured, when files and the
heuristic choose until the problem is launched outside of a capture; and in a distributed run, whose
ranks all have to use the same tiles: tune before it, by `memaop-triton tune`.

A problem is a bucket: numbers of rows are rounded up to powers of two (`Problem.bucketed`). A
configuration may split a sum into parts, so gradients of two configurations differ by rounding.
Runs repeat bit for bit if all choose the same: with files that do not change any more, or with
`off` and no files.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import statistics
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

import torch
import torch.distributed
from triton.errors import TritonError

from memaop_triton.kernels import targets
from memaop_triton.kernels.targets import Target
from memaop_triton.kernels.tuning import cache, defaults, search
from memaop_triton.kernels.tuning.config import Config, GemmConfig, Problem, RowConfig, in_words

_log = logging.getLogger("memaop_triton")

_VARIABLE = "MEMAOP_TRITON_AUTOTUNE"
MODES = ("off", "first-use", "force")

# A configuration takes a second or two to compile, so during training only the best predicted are
# tried.
FIRST_USE_CANDIDATES = 8
# Gains below this are noise: the heuristic's configuration stays.
LEAST_GAIN = 0.02
# Timed calls: at first, at least, at most; for how many milliseconds; and how much slower than the
# best one that is not repeated further may be.
FIRST, LEAST, MOST = 3, 7, 50
BUDGET_MS = 30.0
GIVE_UP = 1.5

# Launches something in the configuration `config=...`, on memory that it may overwrite.
Call = Callable[..., object]
_C = TypeVar("_C", GemmConfig, RowConfig)


@dataclass(frozen=True)
class Choice:
    """The configuration of a problem's launches.

    Attributes:
        origin: "cache", "shipped", "tuned" or "heuristic".
    """

    config: Config
    origin: str


@dataclass(frozen=True)
class Tuned:
    """The outcome for one problem.

    Attributes:
        config: The best configuration.
        milliseconds: Its time.
        heuristic_milliseconds: That of the heuristic's configuration, `None` if it
            does not run.
        timed: Number of configurations that ran.
        skipped: Number of those that do not: too large for the GPU, or not compiled.
    """

    config: Config
    milliseconds: float
    heuristic_milliseconds: float | None
    timed: int
    skipped: int


class Observer:
    """Called while a problem is tuned, by the thread that tunes; logs a line per problem."""

    def begin(self, problem: Problem, count: int) -> None:
        """`count` configurations of a problem are going to be timed."""

    def timed(self, config: Config, milliseconds: float | None) -> None:
        """One of them was; `None` if it does not run."""

    def end(self, problem: Problem, tuned: Tuned | None) -> None:
        """All of them were; `None` if none runs."""
        name = f"{problem.kernel} {problem.key}"
        if tuned is None:
            _log.info("no configuration of %s runs", name)
            return
        before = "does not run"
        if tuned.heuristic_milliseconds is not None:
            before = f"{tuned.heuristic_milliseconds:.4g} ms"
        _log.info(
            "tuned %s: %.4g ms (heuristic %s), the best of %d configurations (%d skipped): %s",
            *(name, tuned.milliseconds, before, tuned.timed, tuned.skipped, in_words(tuned.config)),
        )


# Which configuration a launch gets. --------------------------------------------------------------


def choose(
    problem: Problem, device: torch.device, make_benchmark_call: Callable[[], Call], kind: type[_C]
) -> _C:
    """The configuration of a launch.

    Args:
        problem: What is launched.
        device: Where.
        make_benchmark_call: Makes copies of what the launch writes to, and returns a function that
            launches it on these with `config=...`. Called only if the problem is tuned.
        kind: Of the configuration.

    Raises:
        ValueError: `MEMAOP_TRITON_AUTOTUNE` holds none of its values.
    """
    choice = _by_launch.get((problem, device))
    if choice is None:
        choice = _choose(problem, device, make_benchmark_call)
    return cast(_C, choice.config)


def mode() -> str:
    """What `MEMAOP_TRITON_AUTOTUNE` says, or "force" inside `forced`.

    Raises:
        ValueError: It says anything else than one of its values.
    """
    value = os.environ.get(_VARIABLE) or "first-use"
    if value not in MODES:
        raise ValueError(f"{_VARIABLE}={value!r} is not one of {', '.join(map(repr, MODES))}.")
    return value if _forced is None else "force"


@contextlib.contextmanager
def forced(observer: Observer) -> Iterator[None]:
    """Inside, tune every problem at its first launch, and call `observer`."""
    global _forced
    before, _forced = _forced, observer
    forget()
    try:
        yield
    finally:
        _forced = before


def choices() -> dict[tuple[Problem, torch.device], Choice]:
    """The choices of this process so far, by problem (bucketed) and device."""
    return dict(_by_bucket)


def forget() -> None:
    """Forget all choices, and read the files again when they are next needed."""
    with _lock:
        _by_launch.clear()
        _by_bucket.clear()
        cache.forget()


_lock = threading.RLock()  # the backward passes of two GPUs run in two threads
_by_launch: dict[tuple[Problem, torch.device], Choice] = {}
_by_bucket: dict[tuple[Problem, torch.device], Choice] = {}
_MOST_LAUNCHES = 4096
_forced: Observer | None = None


def _choose(
    launch: Problem, device: torch.device, make_benchmark_call: Callable[[], Call]
) -> Choice:
    problem, target = launch.bucketed(), targets.current(device)
    gpu = cache.gpu_of(device)
    if gpu is None:  # the interpreter has time, and in tests may be any target
        return Choice(defaults.heuristic(problem, target), "heuristic")
    with _lock:
        choice = _by_bucket.get((problem, device))
        if choice is None:
            choice = _decide(problem, device, gpu, make_benchmark_call)
            if choice is None:
                choice = Choice(defaults.heuristic(problem, target), "heuristic")
            if targets.is_capturing(device):  # decided again outside of the capture
                return choice
            _by_bucket[problem, device] = choice
        if len(_by_launch) >= _MOST_LAUNCHES:
            _by_launch.clear()
        _by_launch[launch, device] = choice
    return choice


def _decide(
    problem: Problem,
    device: torch.device,
    gpu: cache.Gpu,
    make_benchmark_call: Callable[[], Call],
) -> Choice | None:
    """The choice by files or tuning; `None` if the heuristic is to choose."""
    wanted, found = mode(), cache.find(gpu, problem)
    kept = None if found is None else Choice(found.config, found.origin)
    is_fresh = found is not None and not found.is_stale
    if is_fresh and wanted != "force":
        return kept
    if targets.is_capturing(device) or _is_distributed():
        # No other launch may happen now, and all ranks must run the same configuration.
        return kept if is_fresh else None
    if wanted != "off":
        return _tune(problem, device, gpu, make_benchmark_call, everything=wanted == "force")
    # Another Triton compiled it, so it may not compile here.
    if kept is not None and _runs(kept.config, make_benchmark_call):
        return kept
    return None


def _is_distributed() -> bool:
    """Whether other ranks take part; `memaop-triton tune` tunes in any case."""
    if _forced is not None:
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size() > 1
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _runs(config: Config, make_benchmark_call: Callable[[], Call]) -> bool:
    with ignore_unlaunchable(), torch.no_grad():
        make_benchmark_call()(config=config)
        return True
    return False


def _tune(
    problem: Problem,
    device: torch.device,
    gpu: cache.Gpu,
    make_benchmark_call: Callable[[], Call],
    everything: bool,
) -> Choice | None:
    try:
        with torch.no_grad():
            call = make_benchmark_call()
    except torch.OutOfMemoryError:
        _warn_of_memory()
        return None
    most = None if everything else FIRST_USE_CANDIDATES
    tuned = tune(problem, targets.current(device), device, call, _forced or Observer(), most)
    if tuned is None:
        return None
    times = tuned.milliseconds, tuned.heuristic_milliseconds
    cache.add(gpu, problem.kernel, cache.entry_for(problem, tuned.config, *times))
    return Choice(tuned.config, "tuned")


@functools.cache
def _warn_of_memory() -> None:
    warnings.warn(
        "there is not enough GPU memory to tune kernels: heuristics choose for those that no file "
        "knows. `memaop-triton tune` tunes them in a process of its own.",
        RuntimeWarning,
        stacklevel=2,
    )


# The search. -------------------------------------------------------------------------------------


def tune(
    problem: Problem,
    target: Target,
    device: torch.device,
    call: Call,
    observer: Observer,
    most: int | None = None,
) -> Tuned | None:
    """Time the candidates for a problem.

    Args:
        problem: What is tuned.
        target: What `device` is.
        device: Where.
        call: Launches it in the configuration `config=...`.
        observer: Called at every step.
        most: Try the heuristic's configuration and the first of the others, so many in all.

    Returns:
        The outcome, or `None` if no candidate runs.
    """
    heuristic = defaults.heuristic(problem, target)
    tried = list(dict.fromkeys((heuristic, *search.candidates(problem, target))))[:most]
    observer.begin(problem, len(tried))
    times: dict[Config, float] = {}
    for config in tried:
        with ignore_unlaunchable():
            best_ms = min(times.values(), default=math.inf)
            times[config] = time_candidate(partial(call, config=config), device, best_ms)
        observer.timed(config, times.get(config))
    tuned = None
    if times:
        best = min(times, key=times.__getitem__)
        before = times.get(heuristic)
        if before is not None and times[best] > (1 - LEAST_GAIN) * before:
            best = heuristic
        tuned = Tuned(best, times[best], before, len(times), len(tried) - len(times))
    observer.end(problem, tuned)
    return tuned


@contextlib.contextmanager
def ignore_unlaunchable() -> Iterator[None]:
    """Leave the block at errors of a configuration that is too large or does not compile."""
    try:
        yield
    except (TritonError, torch.OutOfMemoryError):
        pass
    except RuntimeError as error:
        # A pass of the compiler fails with the type that also stands for a broken GPU.
        if type(error) is not RuntimeError or "PassManager::run failed" not in str(error):
            raise


def time_candidate(
    call: Callable[[], object], device: torch.device, best_ms: float = math.inf
) -> float:
    """Median milliseconds of `call` on the current stream, by events, after one call to warm up.

    With cold caches, which is how training finds them: before each call a buffer larger than the
    second-level cache is overwritten. That also keeps the GPU busy while the call is being
    launched, so that what the host needs for it does not count. A call is repeated for 30 ms, 7 to
    50 times.

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
