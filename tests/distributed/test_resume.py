"""A training killed by SIGKILL goes on from its checkpoint as if nothing had happened."""

import signal

import pytest
import torch

from tests.distributed import resume_worker
from tests.distributed.launch import launch, succeeds


@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_training_equals_the_uninterrupted_one(ranks, tmp_path):
    status, output = launch(resume_worker.__file__, "killed", tmp_path, nproc=ranks)
    if status != -signal.SIGKILL and "Signal 9 (SIGKILL)" not in output:
        pytest.fail(f"not killed:\n{output}", pytrace=False)
    succeeds(resume_worker.__file__, "resumed", tmp_path, nproc=ranks)


def test_the_comparison_sees_a_bit_and_takes_nan_for_itself():
    one = {"a": torch.tensor([1.0, torch.nan, 0.0]), "b": [float("nan"), 2]}
    assert resume_worker.differences(one, {"a": one["a"].clone(), "b": [float("nan"), 2]}) == []
    assert resume_worker.differences(one, one | {"a": torch.tensor([1.0, torch.nan, -0.0])})
    assert resume_worker.differences(one, one | {"b": [float("nan"), 3]})
    assert resume_worker.differences(one, {"a": one["a"]})
