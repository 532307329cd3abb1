"""A training that is killed and goes on, and files that load without this package."""

import signal

import pytest

from tests.distributed.launch import launch, succeeds
from tests.integrations import killed_worker
from tests.processes import run_python

BLOCKED = "import sys\nsys.modules['memaop_triton'] = None\n"


def assert_resumes_bit_for_bit(loop, folder, *name, nproc=1):
    """`loop.train` ends the same, killed after its checkpoint and resumed, or not interrupted."""
    status, output = launch(killed_worker.__file__, "killed", loop, folder, *name, nproc=nproc)
    if status != -signal.SIGKILL and "Signal 9 (SIGKILL)" not in output:
        pytest.fail(f"not killed:\n{output}", pytrace=False)
    succeeds(killed_worker.__file__, "resumed", loop, folder, *name, nproc=nproc)


def run_without_this_package(code):
    """What a Python prints in which this package cannot be imported."""
    return run_python(BLOCKED + code)
