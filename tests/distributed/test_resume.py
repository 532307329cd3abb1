"""A training killed by SIGKILL goes on from its checkpoint as if nothing had happened."""

import os
import signal
import sys
import threading

import pytest
import torch

from tests.distributed import resume_worker
from tests.distributed.launch import TIMEOUT, finish, start, torchrun_command


@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_training_equals_the_uninterrupted_one(ranks, tmp_path):
    def command(mode):
        script = resume_worker.__file__, mode, tmp_path
        if ranks > 1:
            return torchrun_command(*script, nproc=ranks)
        return [sys.executable, *map(str, script)]

    with start(command("killed")) as training:
        # The launcher ends its workers with it.
        watchdog = threading.Timer(TIMEOUT, training.terminate)
        watchdog.start()
        for pid in resume_worker.wait_for_step(training.stdout, 20, ranks):
            os.kill(pid, signal.SIGKILL)
        output, _ = training.communicate(timeout=TIMEOUT)
        watchdog.cancel()
        assert training.returncode == -signal.SIGKILL or "-9" in output
    with start(command("resumed")) as process:
        finish(process)


def test_the_comparison_sees_a_bit_and_takes_nan_for_itself():
    one = {"a": torch.tensor([1.0, torch.nan, 0.0]), "b": [float("nan"), 2]}
    assert resume_worker.differences(one, {"a": one["a"].clone(), "b": [float("nan"), 2]}) == []
    assert resume_worker.differences(one, one | {"a": torch.tensor([1.0, torch.nan, -0.0])})
    assert resume_worker.differences(one, one | {"b": [float("nan"), 3]})
    assert resume_worker.differences(one, {"a": one["a"]})
