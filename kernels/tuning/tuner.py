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
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar, cast

import torch
import torch.distributed
from triton.errors import TritonError
from triton.testing import do_bench

from memaop_triton.kernels import targets
from memaop_triton.kernels.tuning import cache, defaults, search
from memaop_triton.kernels.tuning.cache import Choice, Entry
from memaop_triton.kernels.tuning.config import Config, GemmConfig, Problem, RowConfig, in_words

_log = logging.getLogger("memaop_triton")

_VARIABLE = "MEMAOP_TRITON_AUTOTUNE"
MODES = ("off", "first-use", "force")

# A configuration takes a second or two to compile, so during training only the best predicted are
# tried.
FIRST_USE_CANDIDATES = 8
# Gains below this are noise: the heuristic's configuration stays.
LEAST_GAIN = 0.02
BUDGET_MS = 30  # of timed calls, for each configuration

# Launches something in the configuration `config=...`, on memory that it may overwrite.
Call = Callable[..., object]
_C = TypeVar("_C", GemmConfig, RowConfig)

# Hands out the candidates for a problem one by one, each when the one before has been timed.
Walk = Callable[[Problem, list[Config]], Iterable[Config]]
# A problem that was tuned, and its entry; `None` if no configuration of it runs.
Outcome = tuple[Problem, Entry | None]


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
    bucket = _bucket_of(problem)
    choice = _choices.get((bucket, device)) or _choose(bucket, device, make_benchmark_call)
    return cast(_C, choice.config)


def mode() -> str:
    """The value of `MEMAOP_TRITON_AUTOTUNE`, or "force" inside `forced`.

    Raises:
        ValueError: It has no valid value.
    """
    value = os.environ.get(_VARIABLE) or "first-use"
    if value not in MODES:
        raise ValueError(f"{_VARIABLE}={value!r} is not one of {', '.join(map(repr, MODES))}.")
    return value if _forced is None else "force"


@contextlib.contextmanager
def forced(walk: Walk) -> Iterator[list[Outcome]]:
    """Inside, tune every problem at its first launch; yields the outcomes so far."""
    global _forced
    outcomes: list[Outcome] = []
    _forced = walk, outcomes
    forget()
    try:
        yield outcomes
    finally:
        _forced = None


def choices() -> dict[tuple[Problem, torch.device], Choice]:
    """The choices of this process so far, by problem (bucketed) and device."""
    return dict(_choices)


def version() -> int:
    """A number that grows when choices are forgotten, so that others may be made."""
    return _version


def forget() -> None:
    """Forget all choices, and read the files again when they are next needed."""
    global _version
    with _lock:
        _version += 1
        _choices.clear()
        cache.forget()


_lock = threading.RLock()  # the backward passes of two GPUs run in two threads
_version = 0
_choices: dict[tuple[Problem, torch.device], Choice] = {}
_forced: tuple[Walk, list[Outcome]] | None = None
# Every launch looks up its bucket; a cached one takes a fifth of a microsecond.
_bucket_of = functools.lru_cache(maxsize=4096)(Problem.bucketed)


def _choose(
    problem: Problem, device: torch.device, make_benchmark_call: Callable[[], Call]
) -> Choice:
    target = targets.current(device)
    gpu = cache.gpu_of(device)
    if gpu is None:  # the interpreter: not cached, as tests set any target
        return Choice(defaults.heuristic(problem, target), "heuristic")
    with _lock:
        choice = _choices.get((problem, device))
        if choice is None:
            choice = _decide(problem, device, gpu, make_benchmark_call)
            if choice is None:
                choice = Choice(defaults.heuristic(problem, target), "heuristic")
            if not targets.is_capturing(device):  # decided again outside of the capture
                _choices[problem, device] = choice
    return choice


def _decide(
    problem: Problem,
    device: torch.device,
    gpu: cache.Gpu,
    make_benchmark_call: Callable[[], Call],
) -> Choice | None:
    """The choice by files or tuning; `None` if the heuristic is to choose."""
    wanted, kept = mode(), cache.find(gpu, problem)
    if kept is not None and wanted != "force":
        return kept
    # In a capture no other launch may happen, and all ranks must run the same configuration.
    if wanted == "off" or targets.is_capturing(device) or _is_distributed():
        return kept
    return _tune(problem, device, gpu, make_benchmark_call, everything=wanted == "force")


def _is_distributed() -> bool:
    """Whether other ranks take part; `memaop-triton tune` tunes in any case."""
    if _forced is not None:
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size() > 1
    return os.environ.get("WORLD_SIZE", "1") != "1"


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
    walk, outcomes = _forced or (lambda _, configs: configs, [])
    target = targets.current(device)
    heuristic = defaults.heuristic(problem, target)
    tried = list(dict.fromkeys((heuristic, *search.candidates(problem, target))))
    if not everything:
        tried = tried[:FIRST_USE_CANDIDATES]
    tuned = _best(problem, device, call, heuristic, walk(problem, tried))
    outcomes.append((problem, tuned))
    if tuned is None:
        return None
    cache.add(gpu, problem.kernel, tuned)
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


def _best(
    problem: Problem, device: torch.device, call: Call, heuristic: Config, tried: Iterable[Config]
) -> Entry | None:
    """The best configuration with the times, logged in a line; `None` if none runs."""
    times: dict[Config, float] = {}
    for config in tried:
        try:
            times[config] = time_candidate(partial(call, config=config), device)
        except (TritonError, torch.OutOfMemoryError):
            pass  # too large, or does not compile
        except RuntimeError as error:
            # A failing pass of the compiler raises the same type as a broken GPU.
            if type(error) is not RuntimeError or "PassManager::run failed" not in str(error):
                raise
    name = f"{problem.kernel} {problem.key}"
    if not times:
        _log.info("no configuration of %s runs", name)
        return None
    best = min(times, key=times.__getitem__)
    before = times.get(heuristic)
    if before is not None and times[best] > (1 - LEAST_GAIN) * before:
        best = heuristic
    _log.info(
        "tuned %s: %.4g ms (heuristic %s), the best of %d configurations that run: %s",
        name,
        times[best],
        "does not run" if before is None else f"{before:.4g} ms",
        len(times),
        in_words(best),
    )
    return cache.entry_for(problem, best, times[best], before)


def time_candidate(call: Callable[[], object], device: torch.device) -> float:
    """Median milliseconds of `call` with cold caches, which is how training finds them."""
    with torch.cuda.device(device):
        return float(do_bench(call, warmup=3, rep=BUDGET_MS, return_mode="median"))
