"""Runs a suite in a separate process, and reports its progress."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import memaop_triton
from memaop_triton.errors import CommandError

FOLDER = Path(__file__).resolve().parent
_NOTHING_COLLECTED = 5
# `suites/test_dw.py::test_dw[name] PASSED   [ 3/91]`, as `pytest -v` prints it.
_ENDED = re.compile(r"::(\S+) (PASSED|FAILED|ERROR|SKIPPED)\b.*\[ *(\d+)/(\d+)\]")


class BenchmarkError(CommandError):
    """A suite could not be run."""


@dataclass(frozen=True)
class Outcome:
    """A suite that left results.

    Attributes:
        log: What pytest printed.
        failed: Names of the benchmarks that are not among the results, because they failed.
    """

    log: Path
    failed: tuple[str, ...]


def run_suite(
    suite: str,
    json_path: Path,
    *,
    only: str | None = None,
    threads: int | None = None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Outcome:
    """Run a suite and leave its results, pytest-benchmark's JSON, in `json_path`.

    A benchmark that fails does not stop the others.

    Args:
        suite: A key of `suites.SUITES`.
        json_path: Replaced when the suite is done, and left as it is if nothing succeeded. The log
            is beside it.
        only: Of its benchmarks, those whose name matches this expression of pytest's `-k`.
        threads: Of PyTorch; its own choice if `None`.
        on_progress: Called after every benchmark with how many ended, how many there are, and the
            name of the one that ended.

    Raises:
        BenchmarkError: Nothing matches `only`, or no benchmark succeeded.
        OSError: The folder of `json_path` cannot be written.
    """
    log_path = json_path.with_suffix(".log")
    failed: list[str] = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        log_path.open("w", encoding="utf-8") as log,
    ):
        results = Path(scratch) / "results.json"
        # In a checkout the results name its commit; an installed copy is not in its repository.
        is_installed = FOLDER.parent == _package_folder()
        with subprocess.Popen(
            _command(suite, results, only, threads),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env=_environment(),
            cwd=scratch if is_installed else FOLDER,
        ) as process:
            for line in process.stdout or ():
                log.write(line)
                ended = _ENDED.search(line)
                if ended is not None:
                    name, outcome, done, total = ended.groups()
                    if outcome in ("FAILED", "ERROR"):
                        failed.append(name)
                    on_progress(int(done), int(total), name)
        log.flush()
        if process.returncode == _NOTHING_COLLECTED:
            matching = f" matches --only={only!r}" if only else ""
            raise BenchmarkError(f"no benchmark of --suite={suite}{matching}: see {log_path}.")
        has_ended = process.returncode == 0 or (process.returncode == 1 and failed)
        if not has_ended or not results.exists():
            raise BenchmarkError(
                f"--suite={suite} failed: {_last_error(log_path)} The whole log is {log_path}."
            )
        json_path.write_bytes(results.read_bytes())
    return Outcome(log_path, tuple(failed))


def _command(suite: str, results: Path, only: str | None, threads: int | None) -> list[str]:
    """pytest on the installed benchmarks, with no configuration but this."""
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-c", os.devnull]
    command += ["--rootdir", str(FOLDER), "--import-mode=importlib", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", "-v", "-o", "console_output_style=count", "--suite", suite]
    command += ["--benchmark-columns=median,iqr", f"--benchmark-json={results}"]
    if only:
        command += ["-k", only]
    if threads:
        command += ["--threads", str(threads)]
    return command


def _environment() -> dict[str, str]:
    """This process's, with its own copy of the package first on the path."""
    home = str(_package_folder().parent)
    before = os.environ.get("PYTHONPATH")
    path = home if not before else os.pathsep.join([home, before])
    # No folder of ours may come first on the path: `models` or `report` may be others' names.
    safe = {"PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_ADDOPTS": ""}
    safe["PYTEST_XDIST_WORKER"] = ""  # if set, benchmarks that a worker starts time nothing
    return os.environ | safe | {"PYTHONPATH": path}


def _package_folder() -> Path:
    return Path(memaop_triton.__file__).resolve().parent


def _last_error(log_path: Path) -> str:
    """The last line of a log in which pytest names an error, or its last line."""
    lines = [line.strip() for line in log_path.read_text(encoding="utf-8").splitlines() if line]
    errors = [line.removeprefix("E").strip() for line in lines if line.startswith("E  ")]
    return (errors or lines or ["it printed nothing."])[-1]
