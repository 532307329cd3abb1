"""Options, the fixture that measures, the table at the end, and the progress file."""

import json
import os
import time

import pytest
import torch

from memaop_triton.bench import measure
from memaop_triton.bench.suites import SUITES
from memaop_triton.bench.suites.problem import Problem

HEAD = ("dense ms", "ms", "limit ms", "of limit", "ratio", "[q1, q3]", "wanted", "cold")


def pytest_addoption(parser):
    group = parser.getgroup("memaop_triton")
    group.addoption(
        "--suite", choices=list(SUITES), help="run this suite; otherwise what is in none"
    )
    group.addoption("--threads", type=int, help="threads of PyTorch; its own choice if not given")
    group.addoption("--progress-file", help="append a JSON line here for all that happens")


def pytest_configure(config):
    config.addinivalue_line("markers", "suite(*names): the suites that a benchmark is part of")
    config.memaop_rows = []


def pytest_collection_modifyitems(config, items):
    suite = config.getoption("--suite")
    chosen, left = [], []
    for item in items:
        names = [name for mark in item.iter_markers("suite") for name in mark.args]
        wanted = suite in names if suite else not names
        (chosen if wanted else left).append(item)
    items[:] = chosen
    config.hook.pytest_deselected(items=left)


def pytest_collection_finish(session):
    _tell(session.config, total=len(session.items))


def pytest_runtest_logstart(nodeid, location):
    _started[nodeid] = time.perf_counter()


_started = {}


class Progress:
    """Tells what happens to the file named by `--progress-file`."""

    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            seconds = time.perf_counter() - _started.get(report.nodeid, time.perf_counter())
            name = report.nodeid.rpartition("::")[2]
            _tell(self.config, done=name, outcome=report.outcome, seconds=round(seconds, 2))


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session):
    session.config.pluginmanager.register(Progress(session.config))


def _tell(config, **event):
    path = config.getoption("--progress-file")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


# A result is published: it says what the machine is, and not whose.
def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info.pop("project", None)
    commit_info.pop("branch", None)


@pytest.fixture(autouse=True)
def _threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads") or before)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compare(benchmark, request):
    """Times methods in turns and records the result of a problem in `extra_info`."""
    suite = request.config.getoption("--suite")
    budget = SUITES[suite].budget if suite else SUITES["cpu"].budget

    def run(problem: Problem, kind, title, methods, *, cold=False, **more):
        if not more.get("wanted"):
            more.pop("wanted", None)
        device = torch.device(problem.device)
        clock = measure.clock_for(device, with_host=kind == "overhead")
        results = measure.compare(methods, clock, budget, cold=cold)
        info = problem.describe(kind, title, **more) | {"methods": results}
        benchmark.extra_info.update(info)
        request.config.memaop_rows.append(info)
        # What pytest-benchmark shows beside: the first of ours, on its own.
        subject = next((m for m in methods if m.role == "ours"), methods[0])
        benchmark.pedantic(_waited_for(subject.call, problem.device), rounds=1, warmup_rounds=0)

    return run


def _waited_for(call, device):
    def waiting():
        call()
        torch.cuda.synchronize()

    return call if device == "cpu" else waiting


def pytest_terminal_summary(terminalreporter, config):
    if not config.memaop_rows:
        return
    write = terminalreporter.write_line
    threads = config.getoption("--threads") or torch.get_num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    terminalreporter.section(
        f"ratio to dense, median [quartiles] of rounds, {threads} threads, load {load:.1f}"
    )
    lines = [line for info in config.memaop_rows for line in _lines(info)]
    width = max(len(name) for name, _ in lines) + 2
    widths = [15 if head[0] == "[" else 10 for head in HEAD]
    write(" " * width + "".join(f"{head:>{w}s}" for head, w in zip(HEAD, widths, strict=True)))
    for name, cells in lines:
        row = "".join(f"{cell:>{w}s}" for cell, w in zip(cells, widths, strict=True))
        write(f"{name:{width}s}{row}")


def _lines(info):
    """A name and the cells of every method beside dense and the limit."""
    methods, wanted = info["methods"], info.get("wanted", {})
    dense = next(m for m in methods.values() if m["role"] == "dense")
    limit = next((m for m in methods.values() if m["role"] == "limit"), None)
    for name, method in methods.items():
        if method["role"] in ("dense", "limit"):
            continue
        speedup = method["speedup"]
        yield (
            f"{info['title']} {name}",
            (
                f"{dense['ms']:.3g}",
                f"{method['ms']:.3g}",
                f"{limit['ms']:.3g}" if limit else "",
                f"{limit['ms'] / method['ms']:.2f}" if limit else "",
                f"{speedup['median']:.2f}",
                "[{q1:.2f}, {q3:.2f}]".format(**speedup),
                f"{wanted[name]:.1f}" if name in wanted else "",
                f"{method['cold']['speedup']['median']:.2f}" if "cold" in method else "",
            ),
        )
