"""Starts the processes of each stage, and ends them at its limit.

This process never touches the GPU: a driver that hangs takes a child with it, not the page.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from memaop_triton.bench.first_run import page, records, stages
from memaop_triton.bench.first_run.cases import RESTART
from memaop_triton.bench.first_run.stages import STAGES, Stage

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 3.0  # from SIGTERM to SIGKILL
_LOOK_SECONDS = 0.2
_GIB = 1 << 30
_MEMORY_OF_A_WORKER = 10 * _GIB


class InterruptedRun(BaseException):  # not to be caught by `except Exception`
    """The run was asked to end, by the signal of this number."""


@dataclass
class Worker:
    """A process that runs cases of a stage, or its successor."""

    number: int
    process: subprocess.Popen[bytes]
    begun: int = 0  # cases
    changed: float = field(default_factory=time.monotonic)  # when the last one began


def run(folder: Path, *, is_dry: bool) -> int:
    """All stages, and the page in `folder` and on the screen.

    Returns:
        An exit status: 0 also for what was skipped or cut off, 1 if a case failed.
    """
    records.start(folder)
    started = time.monotonic()
    status = 0
    with _signals_raise():
        try:
            for stage in STAGES:
                limit = stages.limit_of(stage, time.monotonic() - started)
                _one_stage(folder, stage, limit, is_dry)
                page.write(folder)
        except InterruptedRun as interrupted:
            status = 128 + int(str(interrupted))
            _say(f"interrupted by signal {interrupted}")
    text = page.write(folder)
    print("\n" + text, flush=True)
    bad = (records.FAILED, records.DIED)
    return status or int(any(one["status"] in bad for one in records.read(folder)))


def _one_stage(folder: Path, stage: Stage, limit: float, is_dry: bool) -> None:
    found = records.read(folder)
    obstacle = None if stage is STAGES[0] or is_dry else _obstacle(found)
    if obstacle:
        records.write(folder, stage.name, "all", records.SKIPPED, reason=obstacle)
        _say(f"{stage.name}: skipped, {obstacle}")
        return
    start = time.monotonic()
    _run_workers(folder, stage, limit, is_dry, _number_of_workers(stage, found))
    spent = time.monotonic() - start
    counts = page.counts(records.ended(records.read(folder), stage.name))
    _say(f"{stage.name}: {counts}, {spent:.0f} s")


def _obstacle(found: list[records.Record]) -> str | None:
    """Why there is nothing to run on, `None` if there is something."""
    device = page.device_of(found)
    if device is None:
        return "the GPU could not be looked at: see device.log"
    reason: str | None = device["obstacle"]
    return reason


def _number_of_workers(stage: Stage, found: list[records.Record]) -> int:
    """As many as the processors and the GPU's memory allow."""
    device = page.device_of(found) or {}
    if device.get("is_dry"):
        return min(stage.workers, os.cpu_count() or 1)
    if not device.get("is_shared", True):
        return 1
    memory = int(device.get("memory") or 0) // _MEMORY_OF_A_WORKER or 1
    return max(1, min(stage.workers, (os.cpu_count() or 1) // 2, memory))


def _run_workers(folder: Path, stage: Stage, limit: float, is_dry: bool, count: int) -> None:
    deadline = time.monotonic() + limit
    workers = {n: Worker(n, _start(folder, stage, n, count, is_dry, limit)) for n in range(count)}
    try:
        while workers and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
            found = records.read(folder)
            for number, worker in list(workers.items()):
                again = _look(folder, stage, worker, found)
                if again is None:
                    continue
                del workers[number]
                left = deadline - time.monotonic()
                if again and left > 1:
                    process = _start(folder, stage, number, count, is_dry, left)
                    workers[number] = Worker(number, process)
    finally:
        _end([worker.process for worker in workers.values()])
        if workers:
            _close(folder, stage, None, records.CUT_OFF, "the time of the stage was over")
            records.write(folder, stage.name, "limit", records.CUT_OFF, reason="time limit")


def _look(folder: Path, stage: Stage, worker: Worker, found: list[records.Record]) -> bool | None:
    """`None` while the process runs, else whether another has to go on from here."""
    mine = (stage.name, worker.number)
    begun = sum((one["stage"], one.get("worker")) == mine for one in found)
    now = time.monotonic()
    if begun != worker.begun:
        worker.begun, worker.changed = begun, now
    status = worker.process.poll()
    if status is None and now - worker.changed > stage.silence:
        _end([worker.process])
        reason = f"it took more than {stage.silence:.0f} s: its process was ended"
        return _close(folder, stage, worker.number, records.DIED, reason)
    if status is None:
        return None
    if status == 0:
        return False
    reason = f"its process ended with status {status}: see {log_name(stage)}"
    has_closed = _close(folder, stage, worker.number, records.DIED, reason)
    if status != RESTART and not has_closed:
        records.write(folder, stage.name, "start", records.FAILED, reason=reason)
    return status == RESTART or has_closed


def _close(folder: Path, stage: Stage, worker: int | None, status: str, reason: str) -> bool:
    """End the cases that a worker (all, if `None`) had begun; whether there were any."""
    left = records.begun(records.read(folder), stage.name)
    mine = [one for one in left if worker is None or one["worker"] == worker]
    for one in mine:
        records.write(folder, stage.name, one["name"], status, reason=reason)
    return bool(mine)


def log_name(stage: Stage) -> str:
    """What the processes of a stage print goes to this file of the folder."""
    return f"{stage.name.replace(' ', '-')}.log"


def _start(
    folder: Path, stage: Stage, worker: int, workers: int, is_dry: bool, limit: float
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bench.first_run", "--results", str(folder)]
    command += ["--stage", stage.name, "--share", f"{worker}/{workers}", "--limit", f"{limit:.0f}"]
    with (folder / log_name(stage)).open("ab") as log:
        return subprocess.Popen(
            command + ["--dry"] * is_dry,
            cwd=ROOT,
            env=_environment(folder, is_dry),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its own children end with it
        )


def _environment(folder: Path, is_dry: bool) -> dict[str, str]:
    before = os.environ.get("PYTHONPATH")
    path = str(ROOT) if not before else os.pathsep.join([str(ROOT), before])
    own = {"PYTHONPATH": path, "MEMAOP_TRITON_AUTOTUNE": "off"}
    if is_dry:
        own |= {"TRITON_INTERPRET": "1", "MEMAOP_TRITON_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    else:
        # What is measured are the tiles that ship, not those that this user has tuned.
        own |= {"MEMAOP_TRITON_CACHE_DIR": str(folder / "untuned")}
    return os.environ | own


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """End processes and their children; one that waits for a driver for good is left behind."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        latest = time.monotonic() + GRACE_SECONDS
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, latest - time.monotonic()))


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Inside, a request to end raises, so that the page is still written."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise InterruptedRun(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    print(line, flush=True)
