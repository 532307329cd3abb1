"""Runs the cases of a stage one by one in this process, and keeps how each ended."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memaop_triton.bench.first_run import records

#: Exit status of a process whose GPU is not usable any more: another one takes over.
RESTART = 75
LONGEST_TEXT = 4000


@dataclass(frozen=True)
class Place:
    """Where and on what the cases of a stage run.

    Attributes:
        folder: Of the results.
        stage: Its name.
        device: Of all tensors.
        is_dry: Whether the interpreter stands for a GPU, and shapes are small.
        worker: Number of this process among those that share the cases.
        workers: How many there are.
    """

    folder: Path
    stage: str
    device: torch.device
    is_dry: bool
    worker: int = 0
    workers: int = 1

    def is_mine(self, number: int) -> bool:
        """Whether this process runs the case of this number."""
        return number % self.workers == self.worker


@dataclass(frozen=True)
class Case:
    """Something to try.

    Attributes:
        name: Unique in its stage.
        call: Does it and returns figures to keep; it raises if the case fails.
    """

    name: str
    call: Callable[[], dict[str, Any]]


def run(place: Place, cases: Iterable[Case]) -> int:
    """Run those of the cases that are this process's and have not been run.

    Returns:
        An exit status: 0, or `RESTART` if a case left the GPU unusable.
    """
    found = records.read(place.folder)
    known = {one["name"] for one in records.ended(found, place.stage)}
    for number, case in enumerate(cases):
        if case.name in known or not place.is_mine(number):
            continue
        begin(place, case.name)
        start = time.perf_counter()
        figures: dict[str, Any] = {}
        try:
            figures, status = case.call(), records.PASSED
        except Exception:  # whatever it is, it is what came of this case, and others follow
            status, figures = records.FAILED, {"reason": traceback.format_exc()[-LONGEST_TEXT:]}
            print(f"{case.name} failed:\n{figures['reason']}", flush=True)
        end(place, case.name, status, time.perf_counter() - start, **figures)
        if status == records.FAILED and not is_usable(place.device):
            return RESTART
    return 0


def begin(place: Place, name: str) -> None:
    """Note that a case begins."""
    records.write(place.folder, place.stage, name, records.BEGUN, worker=place.worker)


def end(place: Place, name: str, status: str, seconds: float, **figures: Any) -> None:
    """Note how a case ended."""
    records.write(place.folder, place.stage, name, status, seconds=round(seconds, 3), **figures)


def is_usable(device: torch.device) -> bool:
    """Whether the GPU still computes: after an illegal access nothing in this process does."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        return int(torch.ones(2, device=device).sum()) == 2
    except RuntimeError:
        return False
