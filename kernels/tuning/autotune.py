"""Which configuration a launch gets.

    the caller's → settled in this process → the user's cache → shipped → tuning → the heuristic

| `MEMAOP_TRITON_AUTOTUNE` | |
|---|---|
| `first-use` (or unset) | a problem that no file knows is tuned when it is first met |
| `off` | nothing is tuned; files and the heuristic serve |
| `force` | every problem is tuned when it is first met in a process, whatever the files say |

Nothing is tuned on a CPU (Triton's interpreter); while a CUDA graph is captured, where files and
the heuristic serve until the problem is met outside of a capture; and on any rank but 0 of a
distributed run. The other ranks do not wait for rank 0 to find something better: they take what
files and the heuristic say, and see its results at the next start. Tune before a large run, by
`memaop-triton tune`. Where rank 0 does tune it stops after two minutes, because the others wait for
it in their next collective, and goes on at the next start.

A problem is a bucket: numbers of rows are rounded up to powers of two (`Problem.bucketed`). A
configuration may split a sum into parts, so gradients of two configurations differ by rounding.
Runs repeat bit for bit where all find the same: with files that do not change any more, or with
`off` and no files. A run that tuned and is resumed finds its own results; but ranks that had none
of them at the start then get other configurations than before.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed

from memaop_triton.kernels import targets
from memaop_triton.kernels.tuning import cache, defaults, timing, tuner
from memaop_triton.kernels.tuning.cache_entries import Gpu
from memaop_triton.kernels.tuning.defaults import Config, GemmConfig, RowConfig
from memaop_triton.kernels.tuning.problem import Problem
from memaop_triton.kernels.tuning.tuner import Call, Observer

_VARIABLE = "MEMAOP_TRITON_AUTOTUNE"
MODES = ("off", "first-use", "force")

# A configuration takes a second or two to compile: in the middle of training only the most
# promising are tried.
FIRST_USE_CANDIDATES = 8
SHARED_RUN_SECONDS = 120.0

_C = TypeVar("_C", GemmConfig, RowConfig)


@dataclass(frozen=True)
class Choice:
    """What the launches of a problem get.

    Attributes:
        origin: "cache", "shipped", "tuned" or "heuristic".
    """

    config: Config
    origin: str


def choose(
    problem: Problem, device: torch.device, rehearse: Callable[[], Call], kind: type[_C]
) -> _C:
    """The configuration of a launch.

    Args:
        problem: What is launched.
        device: Where.
        rehearse: Makes copies of what the launch writes to, and returns a function that launches
            it on these with `config=...`. Called only if the problem is tuned.
        kind: Of the configuration.

    Raises:
        ValueError: `MEMAOP_TRITON_AUTOTUNE` holds none of its values.
    """
    choice = _by_launch.get((problem, device))
    if choice is None:
        choice = _choose(problem, device, rehearse)
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
    """Until the end, tune every problem when it is first met, and tell `observer`."""
    global _forced
    before, _forced = _forced, observer
    forget()
    try:
        yield
    finally:
        _forced = before


def choices() -> dict[tuple[Problem, torch.device], Choice]:
    """What was settled in this process so far, by problem (bucketed) and device."""
    return dict(_by_bucket)


def forget() -> None:
    """Choose everything anew, and read the files again when they are next needed."""
    with _lock:
        _by_launch.clear()
        _by_bucket.clear()
        cache.forget()


@functools.cache
def describe(device: torch.device) -> Gpu | None:
    """What configurations are kept by; `None` for a device that is no GPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    if torch.version.hip:
        capability = properties.gcnArchName.split(":")[0]
    return Gpu(properties.name, capability, properties.multi_processor_count)


_lock = threading.RLock()  # the backward passes of two GPUs run in two threads
_by_launch: dict[tuple[Problem, torch.device], Choice] = {}
_by_bucket: dict[tuple[Problem, torch.device], Choice] = {}
_MOST_LAUNCHES = 4096
_forced: Observer | None = None
_seconds_spent = 0.0


def _choose(launch: Problem, device: torch.device, rehearse: Callable[[], Call]) -> Choice:
    problem, target = launch.bucketed(), targets.current(device)
    wanted = mode()
    gpu = describe(device)
    if gpu is None:  # the interpreter has time, and in tests may be any target
        return Choice(defaults.heuristic(problem, target), "heuristic")
    with _lock:
        choice = _by_bucket.get((problem, device))
        if choice is None:
            found = cache.find(gpu, problem)
            is_known = found is not None and not found.is_stale and wanted != "force"
            capturing = _is_capturing(device)
            if found is not None and is_known:
                choice = Choice(found.config, found.origin)
            elif wanted != "off" and not capturing and _may_tune():
                choice = _tune(problem, device, gpu, rehearse, wanted)
            elif found is not None and _serves(found, capturing, rehearse):
                choice = Choice(found.config, found.origin)
            else:
                choice = Choice(defaults.heuristic(problem, target), "heuristic")
            if capturing and not is_known:
                return choice
            _by_bucket[problem, device] = choice
        if len(_by_launch) >= _MOST_LAUNCHES:
            _by_launch.clear()
        _by_launch[launch, device] = choice
    return choice


def _serves(found: cache.Found, capturing: bool, rehearse: Callable[[], Call]) -> bool:
    """Whether an entry may be used where nothing is tuned; a stale one is tried first."""
    if not found.is_stale or capturing:
        return not found.is_stale
    with tuner.misfits_suppressed():
        _rehearsed(rehearse)(config=found.config)
        return True
    return False


def _tune(
    problem: Problem, device: torch.device, gpu: Gpu, rehearse: Callable[[], Call], wanted: str
) -> Choice:
    global _seconds_spent
    target, began = targets.current(device), time.monotonic()
    heuristic = Choice(defaults.heuristic(problem, target), "heuristic")
    try:
        call = _rehearsed(rehearse)
    except torch.OutOfMemoryError:
        _warn_of_memory()
        return heuristic
    tuned = tuner.tune(
        problem,
        target,
        device,
        call,
        timing.time_candidate,
        _forced or Observer(),
        None if wanted == "force" else FIRST_USE_CANDIDATES,
    )
    _seconds_spent += time.monotonic() - began
    if tuned is None:
        return heuristic
    entry = cache.entry_for(problem, tuned.config, tuned.milliseconds, tuned.heuristic_milliseconds)
    cache.add(gpu, problem.kernel, entry)
    return Choice(tuned.config, "tuned")


def _rehearsed(rehearse: Callable[[], Call]) -> Call:
    with torch.no_grad():
        return rehearse()


@functools.cache
def _warn_of_memory() -> None:
    warnings.warn(
        "there is not enough GPU memory to tune kernels: heuristics choose for those that no file "
        "knows. `memaop-triton tune` tunes them in a process of its own.",
        RuntimeWarning,
        stacklevel=2,
    )


def _is_capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _may_tune() -> bool:
    """Whether this process is one that tunes: alone, or the first of a distributed run."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        rank, world = distributed.get_rank(), distributed.get_world_size()
        return world == 1 or (rank == 0 and _seconds_spent < SHARED_RUN_SECONDS)
    if os.environ.get("RANK", "0") != "0":
        return False
    return os.environ.get("WORLD_SIZE", "1") == "1" or _seconds_spent < SHARED_RUN_SECONDS
