"""The first run on a GPU: its stages, limits and page, without a GPU."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from memaop_triton.bench.first_run import (
    cases,
    dry,
    page,
    problems,
    records,
    running,
    smoke,
    stages,
)
from memaop_triton.bench.first_run.cases import Case, Place
from memaop_triton.bench.first_run.stages import STAGES, Stage
from tests.processes import ROOT
from tests.traffic import counted

DEVICE = {
    "gpu": "NVIDIA H100 80GB HBM3", "gpus": 1, "capability": "sm_90", "multiprocessors": 132,
    "memory": 80 << 30, "cache": 50 << 20, "runtime": "CUDA 12.8", "clocks": None,
    "is_shared": True, "predicted_as": "H100 SXM", "obstacle": None, "is_dry": False,
    "python": "3.12.1", "torch": "2.11.0", "triton": "3.6.0", "numpy": "2.3", "pytest": "8.4",
    "missing": {"rich": "tests of the command line are skipped"}, "processors": 16,
    "commit": "abc",
}  # fmt: skip


def method(us, predicted, **rest):
    figures = {"us": us, "q1": us, "q3": us, "host_us": 9.0, "predicted": {"us": predicted}}
    return figures | {"kernels": []} | rest


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, "smoke", torch.device("cpu"), is_dry=True)


def fails():
    raise ValueError("a wrong value")


# What is kept. -----------------------------------------------------------------------------------


def test_a_case_is_kept_before_the_next_begins_and_not_run_twice(place):
    seen = []

    def second():
        seen.append([one["status"] for one in records.read(place.folder)])
        return {"error": 0.5}

    every = [Case("first", fails), Case("second", second)]
    assert cases.run(place, every) == 0
    assert seen == [["begun", "failed", "begun"]]
    first, second_one = records.ended(records.read(place.folder), "smoke")
    assert "ValueError: a wrong value" in first["reason"]
    assert second_one["error"] == 0.5
    assert cases.run(place, every) == 0
    assert len(seen) == 1


def test_a_gpu_that_is_not_usable_any_more_is_left_to_another_process(place, monkeypatch):
    monkeypatch.setattr(cases, "is_usable", lambda device: False)
    every = [Case("first", fails), Case("second", dict)]
    assert cases.run(place, every) == cases.RESTART
    assert [one["name"] for one in records.ended(records.read(place.folder), "smoke")] == ["first"]
    assert cases.run(place, every) == 0  # goes on behind it
    assert [one["status"] for one in records.ended(records.read(place.folder), "smoke")] == [
        "failed",
        "passed",
    ]


def test_processes_share_the_cases(place):
    every = [Case(str(i), dict) for i in range(5)]
    for worker, mine in ((0, ["0", "2", "4"]), (1, ["1", "3"])):
        before = len(records.ended(records.read(place.folder), "smoke"))
        cases.run(replace(place, worker=worker, workers=2), every)
        ended = records.ended(records.read(place.folder), "smoke")[before:]
        assert [one["name"] for one in ended] == mine


def test_a_line_that_was_cut_off_costs_no_other(tmp_path):
    records.write(tmp_path, "smoke", "first", records.PASSED)
    with (tmp_path / records.FILE).open("a") as file:
        file.write('{"stage": "smo')
    assert [one["name"] for one in records.read(tmp_path)] == ["first"]
    assert "1 passed" in page.write(tmp_path)


def test_an_earlier_run_is_kept(tmp_path):
    records.write(tmp_path, "smoke", "first", records.PASSED)
    (tmp_path / records.TILES / "gpu").mkdir(parents=True)
    records.start(tmp_path)
    assert records.read(tmp_path) == []
    assert len(list(tmp_path.glob("results-*.jsonl"))) == 1
    assert len(list(tmp_path.glob("configs-*/gpu"))) == 1
    assert not (tmp_path / records.TILES).exists()


# Limits. -----------------------------------------------------------------------------------------


def test_all_stages_fit_into_ten_minutes_and_time_that_is_left_is_used():
    assert sum(one.seconds for one in STAGES) + stages.PAGE_SECONDS <= stages.TOTAL_SECONDS
    device, smoke_stage, *_, last = STAGES
    assert stages.limit_of(device, 0) >= device.seconds
    # A stage that was quick leaves its time to the next.
    spare = stages.limit_of(smoke_stage, 5) - stages.limit_of(smoke_stage, 30)
    assert spare == 25
    assert stages.limit_of(last, stages.TOTAL_SECONDS) == 1


@pytest.fixture
def stand_in(monkeypatch):
    """Processes of stages run this code instead, in which `note(name, status)` keeps a line."""

    def use(code):
        start = (
            "import os, sys, time, signal\n"
            "from pathlib import Path\n"
            "from memaop_triton.bench.first_run import records\n"
            "folder = Path(sys.argv[1])\n"
            "def note(name, status):\n"
            "    records.write(folder, 'smoke', name, status, worker=0)\n"
            "known = {one['name'] for one in records.ended(records.read(folder), 'smoke')}\n"
        )

        def begin(folder, stage, worker, workers, is_dry, limit):
            return subprocess.Popen(
                [sys.executable, "-c", start + code, str(folder)],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )

        monkeypatch.setattr(running, "_start", begin)

    return use


STAGE = Stage("smoke", "", 60, 60)


def statuses(folder):
    return {one["name"]: one["status"] for one in records.ended(records.read(folder), "smoke")}


@pytest.mark.slow
def test_a_stage_is_ended_at_its_limit_and_says_where_it_was(stand_in, tmp_path):
    stand_in("note('a', 'begun'); note('a', 'passed'); note('b', 'begun'); time.sleep(100)")
    start = time.monotonic()
    running._run_workers(tmp_path, STAGE, 8.0, True, 1)
    assert time.monotonic() - start < 20
    assert statuses(tmp_path) == {"a": "passed", "b": "cut off", "limit": "cut off"}


def test_a_process_that_dies_is_followed_by_one_that_goes_on_behind_its_case(stand_in, tmp_path):
    stand_in(
        "for name in 'abc':\n"
        "    if name in known: continue\n"
        "    note(name, 'begun')\n"
        "    if name == 'b': os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    note(name, 'passed')\n"
    )
    running._run_workers(tmp_path, STAGE, 60.0, True, 1)
    assert statuses(tmp_path) == {"a": "passed", "b": "died", "c": "passed"}


@pytest.mark.slow
def test_a_case_that_is_stuck_is_given_up(stand_in, tmp_path):
    stand_in(
        "for name in 'ab':\n"
        "    if name in known: continue\n"
        "    note(name, 'begun')\n"
        "    if name == 'a': time.sleep(100)\n"
        "    note(name, 'passed')\n"
    )
    running._run_workers(tmp_path, replace(STAGE, silence=5), 60.0, True, 1)
    assert statuses(tmp_path) == {"a": "died", "b": "passed"}


def test_a_process_that_cannot_start_is_not_started_again_and_again(stand_in, tmp_path):
    stand_in("sys.exit(3)")
    running._run_workers(tmp_path, STAGE, 60.0, True, 1)
    assert statuses(tmp_path) == {"start": "failed"}


# The page. ---------------------------------------------------------------------------------------


def test_the_page_names_what_failed_and_the_worst_misprediction(tmp_path):
    records.write(tmp_path, "device", "device", records.PASSED, **DEVICE)
    records.write(tmp_path, "smoke", "select", records.FAILED, reason="Trace\nError: 3 rows, not 4")
    records.write(tmp_path, "gpu tests", "a.py::b", records.CUT_OFF, reason="the time was over")
    records.write(
        tmp_path, "times", "dW, 64 x 32 x 16, 1/8", records.PASSED, kind="dW", shape=[64, 32, 16],
        inverse=8,
        methods={
            "dense": method(50.0, 53.0),
            "fast": method(25.0, 75.0, kernels=[{"kernel": "k", "us": 9.0, "launches": 2}]),
            "slow": method(140.0, 70.0),
        },
    )  # fmt: skip
    tuned = [
        {"kernel": "project", "problem": "M=1", "tile": "t", "ms": 0.1, "heuristic_ms": 0.2},
        {"kernel": "project", "problem": "M=2", "tile": "u", "ms": 0.1, "heuristic_ms": None},
    ]
    records.write(tmp_path, "tuning", "one", records.PASSED, tuned=tuned)
    text = page.write(tmp_path)
    assert text == (tmp_path / page.FILE).read_text()
    for line in (
        "GPU: NVIDIA H100 80GB HBM3",
        "without rich: tests of the command line are skipped",
        "  smoke: select: Error: 3 rows, not 4",
        "  gpu tests: a.py::b: the time was over",
        "Worst misprediction: dW, 64 x 32 x 16, 1/8, fast: 25.0 µs measured, 75.0 predicted, a "
        "factor of 0.33",
        "  measured, µs (launches): k 9.0 (2)",
        "Tuned: 2 problems, 1 with a better tile than the one that ships:",
        "  project M=1: 200.0 µs, best 100.0 µs, 2.00 times: t",
    ):
        assert line in text.splitlines()
    row = next(line.split() for line in text.splitlines() if line.strip().startswith("slow"))
    assert row == ["slow", "140.0", "140.0-140.0", "9", "70", "2.00", "0.36", "0.76"]


def test_a_page_of_nothing(tmp_path):
    assert "could not be described" in page.write(tmp_path)


# The whole run. ----------------------------------------------------------------------------------


def kernels():
    """The names of all kernels that are launched by the host."""
    names = set()
    for path in (ROOT / "kernels" / "gpu").glob("*.py"):
        module = import_module(f"memaop_triton.kernels.gpu.{path.stem}")
        names |= {
            name
            for name, value in vars(module).items()
            if isinstance(value, JITFunction | InterpretedFunction) and name.endswith("_kernel")
        }
    return names


@pytest.mark.slow
def test_the_smoke_stage_launches_every_kernel(place, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("MEMAOP_TRITON_BACKEND", "triton")
    with dry.interpreter(True), counted() as launches:
        status = cases.run(place, smoke.all_cases(place.device, problems.sizes(place)))
    ended = records.ended(records.read(place.folder), "smoke")
    assert status == 0
    assert [one["name"] for one in ended if one["status"] != "passed"] == []
    assert len({one["name"] for one in ended}) == len(ended)
    assert kernels() <= {launch.kernel for launch in launches}


def run_make(*arguments, **variables):
    environ = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "MAKEFLAGS")}
    command = ["make", "VENV=none", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environ | variables, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the run would take minutes")
def test_without_a_gpu_every_stage_says_so_in_one_line(tmp_path):
    done = run_make("gpu", f"RESULTS={tmp_path}")
    assert done.returncode == 0, done.stderr
    reason = "skipped, there is no GPU: torch.cuda.is_available() is False"
    lines = done.stdout.splitlines()
    assert [line for line in lines if reason in line] == [f"{s.name}: {reason}" for s in STAGES[1:]]
    assert "Nothing was run: there is no GPU" in done.stdout


# Stands for an image without the packages that a run can do without, and without network.
BARE = """
import socket, sys
from importlib.machinery import PathFinder

HIDDEN = {"platformdirs", "filelock", "rich", "typer", "pytest_benchmark", "matplotlib", "scipy",
          "jinja2", "sklearn", "xdist"}


class Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.split(".")[0] in HIDDEN
        return None if hidden else PathFinder.find_spec(name, path, target)

    @staticmethod
    def find_distributions(*args, **kwargs):
        for one in PathFinder.find_distributions(*args, **kwargs):
            if one.metadata["Name"].removeprefix("pytest-").replace("-", "_") not in HIDDEN:
                yield one


def refuse(*args, **kwargs):
    raise OSError("there is no network")


sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""


@pytest.mark.slow
def test_a_dry_run_in_a_bare_image_takes_every_stage(tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "sitecustomize.py").write_text(BARE)
    done = run_make("gpu-dry", f"RESULTS={tmp_path}/out", PYTHONPATH=str(bare))
    assert done.returncode == 0, done.stdout + done.stderr
    found = records.read(tmp_path / "out")
    for stage in STAGES:
        assert any(one["status"] == "passed" for one in records.ended(found, stage.name)), stage
    device = page.device_of(found)
    assert set(device["missing"]) == {"platformdirs", "filelock", "typer", "rich"}
    files = list((tmp_path / "out" / "configs").rglob("*"))
    assert {one.suffix for one in files if one.is_file()} == {".json"}
    shipped = next(one for one in files if one.name == "gather_gemm.json")
    assert json.loads(shipped.read_text())["gpu"]["name"] == dry.GPU_NAME
    assert "A DRY RUN" in done.stdout


@pytest.mark.slow
def test_a_run_that_is_asked_to_end_still_prints_its_page(tmp_path):
    command = [sys.executable, "-m", "bench.first_run", "--dry", "--results", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while not records.begun(records.read(tmp_path), "smoke"):
            time.sleep(0.1)
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "interrupted by signal 15" in printed
    assert "Cut off:" in printed
    assert (tmp_path / page.FILE).exists()
    assert Path(tmp_path / records.FILE).exists()
