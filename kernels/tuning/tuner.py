"""The search for the best configuration of one problem: every candidate is run and timed."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from triton.errors import TritonError

from memaop_triton.kernels.targets import Target
from memaop_triton.kernels.tuning import defaults, search
from memaop_triton.kernels.tuning.cache_entries import fields_of
from memaop_triton.kernels.tuning.defaults import Config
from memaop_triton.kernels.tuning.problem import Problem

_log = logging.getLogger("memaop_triton")

# Gains below this are noise: the heuristic's configuration stays.
LEAST_GAIN = 0.02

# Launches something in the configuration `config=...`, on memory that it may overwrite.
Call = Callable[..., object]
Timer = Callable[[Callable[[], object], torch.device, float], float]


@dataclass(frozen=True)
class Tuned:
    """The outcome for one problem.

    Attributes:
        config: The best configuration.
        milliseconds: Its time.
        heuristic: The configuration that serves without tuning.
        heuristic_milliseconds: Its time, `None` if it does not run.
        timed: Number of configurations that ran.
        skipped: Number of those that do not: too large for the GPU, or not compiled.
        seconds: What all of it took.
    """

    problem: Problem
    config: Config
    milliseconds: float
    heuristic: Config
    heuristic_milliseconds: float | None
    timed: int
    skipped: int
    seconds: float

    def __str__(self) -> str:
        before = "does not run"
        if self.heuristic_milliseconds is not None:
            before = f"{self.heuristic_milliseconds:.4g} ms"
        return (
            f"tuned {self.problem.kernel} {self.problem.key} in {self.seconds:.1f} s: "
            f"{self.milliseconds:.4g} ms (heuristic {before}), the best of {self.timed} "
            f"configurations ({self.skipped} skipped): {in_words(self.config)}"
        )


class Observer:
    """Is told how tuning goes, by the thread that tunes; this one logs a line per problem."""

    def begin(self, problem: Problem, count: int) -> None:
        """`count` configurations of a problem are going to be timed."""

    def timed(self, config: Config, milliseconds: float | None) -> None:
        """One of them was; `None` if it does not run."""

    def end(self, problem: Problem, tuned: Tuned | None) -> None:
        """All of them were; `None` if none runs."""
        if tuned is None:
            _log.info("no configuration of %s %s runs", problem.kernel, problem.key)
        else:
            _log.info("%s", tuned)


def in_words(config: Config) -> str:
    """The fields of a configuration in one line: "block_n=128 block_p=64 ..."."""
    return " ".join(f"{name}={int(value)}" for name, value in fields_of(config).items())


def tune(
    problem: Problem,
    target: Target,
    device: torch.device,
    call: Call,
    timer: Timer,
    observer: Observer,
    most: int | None = None,
) -> Tuned | None:
    """Time the candidates for a problem.

    Args:
        problem: What is tuned.
        target: What `device` is.
        device: Where.
        call: Launches it in the configuration `config=...`.
        timer: As `timing.time_candidate`.
        observer: Is told of every step.
        most: Try the heuristic's configuration and the first of the others, so many in all.

    Returns:
        The outcome, or `None` if no candidate runs.
    """
    began = time.monotonic()
    heuristic = defaults.heuristic(problem, target)
    tried = list(dict.fromkeys((heuristic, *search.candidates(problem, target))))[:most]
    observer.begin(problem, len(tried))
    times: dict[Config, float] = {}
    for config in tried:
        found = _time(
            partial(call, config=config), device, timer, min(times.values(), default=math.inf)
        )
        if found is not None:
            times[config] = found
        observer.timed(config, found)
    tuned = None
    if times:
        best = min(times, key=lambda config: times[config])
        before = times.get(heuristic)
        if before is not None and times[best] > (1 - LEAST_GAIN) * before:
            best = heuristic
        tuned = Tuned(
            problem,
            best,
            times[best],
            heuristic,
            before,
            len(times),
            len(tried) - len(times),
            time.monotonic() - began,
        )
    observer.end(problem, tuned)
    return tuned


@contextlib.contextmanager
def misfits_suppressed() -> Iterator[None]:
    """Leave the block at what says that a configuration is too large, or is not compiled."""
    try:
        yield
    except (TritonError, torch.OutOfMemoryError):
        pass
    except RuntimeError as error:
        # A pass of the compiler fails with the type that also stands for a broken GPU.
        if type(error) is not RuntimeError or "PassManager::run failed" not in str(error):
            raise


def _time(
    call: Callable[[], object], device: torch.device, timer: Timer, best: float
) -> float | None:
    with misfits_suppressed():
        return timer(call, device, best)
    return None
