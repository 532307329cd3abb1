"""`MemAOPState` in the checkpoints of Accelerate."""

import pytest
import torch
from torch import nn

from tests.distributed.resume_worker import differences
from tests.integrations.killing import assert_resumes_bit_for_bit, run_without_this_package

pytest.importorskip("accelerate", reason="accelerate is not installed, with which this is tested")
from memaop_triton.integrations.accelerate import MemAOPState
from tests.integrations import accelerate_loop


def test_a_resumed_training_equals_the_uninterrupted_one(tmp_path):
    whole = accelerate_loop.train(tmp_path, 10)
    assert whole["memories"]
    assert differences(whole, accelerate_loop.train(tmp_path, 10, resume_at=5)) == []


@pytest.mark.slow  # two or four processes
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_training_goes_on_bit_for_bit(processes, tmp_path):
    assert_resumes_bit_for_bit("accelerate_loop", tmp_path, nproc=processes)


def test_another_number_of_processes_starts_with_empty_memories(tmp_path):
    run = accelerate_loop.Run()
    run.step(0)
    state = MemAOPState(run.net)
    saved = state.state_dict()
    with pytest.warns(UserWarning, match="2 processes saved the memories and 1 load them"):
        state.load_state_dict({"processes": 2 * saved["processes"]})
    assert [run.net[i].memory.rows for i in (0, 3)] == [0, 0]


def test_names_are_those_of_the_model_however_it_is_wrapped():
    run = accelerate_loop.Run()
    run.step(0)
    plain, compiled = MemAOPState(run.net), MemAOPState(torch.compile(run.net, backend="eager"))
    assert differences(plain.state_dict(), compiled.state_dict()) == []
    assert list(plain.state_dict()["processes"][0]["memories"]) == ["0", "3"]


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="no converted layer"):
        MemAOPState(nn.Linear(2, 2))


@pytest.mark.slow  # a process
def test_a_checkpoint_loads_where_this_package_is_not_installed(tmp_path):
    accelerate_loop.train(tmp_path, 2)
    printed = run_without_this_package(f"""
import torch
from safetensors.torch import load_file
folder = {str(tmp_path / "step=1")!r}
saved = torch.load(folder + "/custom_checkpoint_0.pkl", weights_only=True)
print(*saved["processes"][0]["memories"], *sorted(load_file(folder + "/model.safetensors")))
""")
    assert printed == "0 3 0.bias 0.weight 3.bias 3.weight"
