"""As tests/test_resume.py, with two processes under DDP whose ranks are all killed."""

import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from tests import resume_worker
from tests.distributed.launch import TIMEOUT, torchrun, torchrun_command, worker_environment

RANKS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What an uninterrupted run and one that was killed and resumed left."""
    folder = tmp_path_factory.mktemp("resume")
    script = resume_worker.__file__
    with subprocess.Popen(
        torchrun_command(script, "killed", folder, nproc=RANKS),
        env=worker_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as launcher:
        # The launcher ends its workers with it.
        watchdog = threading.Timer(TIMEOUT, launcher.terminate)
        watchdog.start()
        victims = resume_worker.wait_for_step(launcher.stdout, 20, RANKS)
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        output, _ = launcher.communicate(timeout=TIMEOUT)
        watchdog.cancel()
        assert "-9" in output
    torchrun(script, "whole", folder, nproc=RANKS)
    torchrun(script, "resumed", folder, nproc=RANKS)
    return folder


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("name", resume_worker.cases_of_ranks())
def test_resumed_training_equals_the_uninterrupted_one(folder, name, rank):
    resume_worker.check_outcome(folder, name, rank)
