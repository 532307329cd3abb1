"""Options, the fixture that measures, and the table at the end."""

import pytest
import torch

from memaop_triton.bench import measure
from memaop_triton.bench.suites import SUITES
from memaop_triton.bench.suites.problem import Problem


def pytest_addoption(parser):
    group = parser.getgroup("memaop_triton")
    group.addoption(
        "--suite", choices=list(SUITES), help="run this suite; otherwise what is in none"
    )
    group.addoption("--threads", type=int, help="threads of PyTorch; its own choice if not given")


def pytest_configure(config):
    config.addinivalue_line("markers", "suite(*names): the suites that a benchmark is part of")
    config.compared = []


def pytest_collection_modifyitems(config, items):
    suite = config.getoption("--suite")
    chosen, left = [], []
    for item in items:
        names = [name for mark in item.iter_markers("suite") for name in mark.args]
        wanted = suite in names if suite else not names
        (chosen if wanted else left).append(item)
    items[:] = chosen
    config.hook.pytest_deselected(items=left)


# A result is published: it names the kind of machine, not its owner.
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
    budget = SUITES[request.config.getoption("--suite") or "cpu"].budget

    def run(problem: Problem, kind, title, methods, *, cold=False, wanted=None, model=None):
        device = torch.device(problem.device)
        clock = measure.clock_for(device, with_host=kind == "overhead")
        results = measure.compare(methods, clock, budget, cold=cold)
        benchmark.extra_info.update(
            problem.describe(), kind=kind, title=title, model=model, wanted=wanted or {},
            methods=results,
        )  # fmt: skip
        request.config.compared.append(benchmark.extra_info)
        # What `pytest-benchmark compare` compares: the first of ours, on its own.
        subject = next(method for method in methods if method.role == "ours")
        wall = measure.clock_for(device, with_host=True)
        benchmark.pedantic(
            wall.seconds, (subject.call, 1), rounds=measure.FEWEST_ROUNDS, warmup_rounds=1
        )

    return run


def pytest_terminal_summary(terminalreporter, config):
    lines = [line for info in config.compared for line in _ratios(info)]
    if not lines:
        return
    terminalreporter.section("ratio to dense, median [quartiles] of rounds")
    width = max(len(name) for name, _ in lines)
    for name, ratio in lines:
        terminalreporter.write_line(f"{name:{width}s}  {ratio}")


def _ratios(info):
    """A name and a text for every method beside dense and the limit."""
    methods, wanted = info["methods"], info["wanted"]
    for name, method in methods.items():
        if method["role"] in ("dense", "limit"):
            continue
        speedup = method["speedup"]
        ratio = "{median:5.2f} [{q1:.2f}, {q3:.2f}]".format(**speedup)
        if "cold" in method:
            ratio += f", caches flushed {method['cold']['speedup']['median']:.2f}"
        if name in wanted:
            ratio += f", wanted {wanted[name]:.1f}"
        if "limit" in methods:
            ratio += f", {methods['limit']['ms'] / method['ms']:.2f} of the limit's speed"
        yield f"{info['title']} {name}", ratio
