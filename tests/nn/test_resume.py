"""A training killed by SIGKILL goes on from its checkpoint as if nothing had happened."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from tests import resume_worker
from tests.distributed.launch import TIMEOUT, worker_environment


def start(*args):
    return subprocess.Popen(
        [sys.executable, resume_worker.__file__, *map(str, args)],
        env=worker_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What an uninterrupted run and one that was killed and resumed left."""
    folder = tmp_path_factory.mktemp("resume")
    with start("whole", folder) as whole, start("killed", folder) as victim:
        watchdog = threading.Timer(TIMEOUT, victim.kill)
        watchdog.start()
        resume_worker.wait_for_step(victim.stdout, 20)
        victim.kill()
        watchdog.cancel()
        assert victim.wait(TIMEOUT) == -signal.SIGKILL
        finish(whole)
    with start("resumed", folder) as resumed:
        finish(resumed)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", resume_worker.cases())
def test_resumed_training_equals_the_uninterrupted_one(folder, name):
    resume_worker.check_outcome(folder, name)


def test_the_comparison_sees_a_bit_and_takes_nan_for_itself():
    one = {"a": torch.tensor([1.0, torch.nan, 0.0]), "b": [float("nan"), 2]}
    assert resume_worker.differences(one, {"a": one["a"].clone(), "b": [float("nan"), 2]}) == []
    assert resume_worker.differences(one, one | {"a": torch.tensor([1.0, torch.nan, -0.0])})
    assert resume_worker.differences(one, one | {"b": [float("nan"), 3]})
    assert resume_worker.differences(one, {"a": one["a"]})
