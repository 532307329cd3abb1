"""Options, and the fixture that measures."""

import pytest
import torch

from memaop_triton.bench import measure
from memaop_triton.bench.suites import SUITES
from memaop_triton.bench.suites.problem import Problem


def pytest_addoption(parser):
    group = parser.getgroup("memaop_triton")
    group.addoption("--suite", choices=list(SUITES), default="quick", help="what to run")
    group.addoption("--threads", type=int, help="threads of PyTorch; its own choice if not given")


def pytest_configure(config):
    config.addinivalue_line("markers", "suite(*names): the suites that a benchmark is part of")


def pytest_collection_modifyitems(config, items):
    suite = config.getoption("--suite")
    chosen, left = [], []
    for item in items:
        wanted = any(suite in mark.args for mark in item.iter_markers("suite"))
        (chosen if wanted else left).append(item)
    items[:] = chosen
    config.hook.pytest_deselected(items=left)


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
    budget = SUITES[request.config.getoption("--suite")].budget

    def run(problem: Problem, kind, title, methods, *, cold=False, wanted=None, model=None):
        device = torch.device(problem.device)
        clock = measure.clock_for(device, with_host=kind == "overhead")
        results = measure.compare(methods, clock, budget, cold=cold)
        benchmark.extra_info.update(
            problem.describe(), kind=kind, title=title, model=model, wanted=wanted or {},
            methods=results,
        )  # fmt: skip
        # What `pytest-benchmark compare` compares: the first of ours, on its own.
        subject = next(method for method in methods if method.role == "ours")
        wall = measure.clock_for(device, with_host=True)
        benchmark.pedantic(
            wall.seconds, (subject.call, 1), rounds=measure.FEWEST_ROUNDS, warmup_rounds=1
        )

    return run
