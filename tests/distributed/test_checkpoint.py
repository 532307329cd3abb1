import pytest
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from memaop_triton import memory_state_dict
from memaop_triton.distributed.checkpoint import load_memory, save_memory
from tests.distributed import checkpoint_worker
from tests.distributed.checkpoint_worker import (
    SCHEMES,
    converted,
    refused,
    starts_empty,
    trained,
)
from tests.distributed.launch import torchrun
from tests.resume_worker import differences


def in_two_processes(*checks, folder):
    """Run functions of the worker one after the other, each in a folder of its own."""
    torchrun(checkpoint_worker.__file__, folder, *checks)


def test_every_rank_gets_its_own_memories_back(tmp_path):
    in_two_processes(
        "round_trip", "before_the_first_step", "beside_the_model", "groups_of_one", folder=tmp_path
    )


def test_what_does_not_fit_is_refused_on_all_ranks(tmp_path):
    in_two_processes(
        "other_models",
        "one_rank_differs",
        "unreadable_on_one_rank",
        "damaged_on_one_rank",
        "no_memories",
        folder=tmp_path,
    )


def test_another_number_of_ranks_starts_empty_and_says_so(tmp_path):
    (tmp_path / "more_ranks").mkdir()
    save_memory(trained("residual", 0), tmp_path / "more_ranks" / "single")
    in_two_processes("more_ranks", "save_for_one", folder=tmp_path)
    path = tmp_path / "save_for_one" / "both"
    starts_empty(path, "saved by 2 ranks and this run has 1")


@pytest.mark.parametrize("memory", SCHEMES)
@pytest.mark.parametrize("rank", [0, 1], ids=["filled", "filled otherwise"])
def test_one_process_needs_no_process_group(tmp_path, memory, rank):
    model = trained(memory, rank)
    save_memory(model, tmp_path)
    other = converted(memory)
    load_memory(other, tmp_path)
    assert differences(memory_state_dict(model), memory_state_dict(other)) == []


@pytest.mark.parametrize("memory", SCHEMES)
def test_memory_without_a_step_empties_the_one_that_loads_it(tmp_path, memory):
    save_memory(converted(memory), tmp_path)
    other = trained(memory, 0)
    load_memory(other, tmp_path)
    assert all(layer.memory is None or layer.memory.nbytes == 0 for layer in other[::2])


def test_storage_is_the_callers_choice(tmp_path):
    model, other = trained("residual", 0), converted("residual")
    save_memory(model, storage_writer=FileSystemWriter(tmp_path, single_file_per_rank=False))
    load_memory(other, storage_reader=FileSystemReader(tmp_path))
    assert differences(memory_state_dict(model), memory_state_dict(other)) == []
    load_memory(other, tmp_path, storage_reader=FileSystemReader(tmp_path / "elsewhere"))


def test_layers_may_have_any_name(tmp_path):
    """The model itself is its only layer, or a name has dots and ends like that of a tensor."""
    alone, other = trained("residual", 0)[0], converted("residual")[0]
    save_memory(alone, tmp_path / "alone")
    load_memory(other, tmp_path / "alone")
    assert differences(memory_state_dict(alone), memory_state_dict(other)) == []

    def nested(layer):
        return nn.ModuleDict({"x": nn.ModuleDict({"filled": layer}), "rank_0": nn.ReLU()})

    deep, other = nested(trained("residual", 1)[2]), nested(converted("residual")[2])
    save_memory(deep, tmp_path / "deep")
    load_memory(other, tmp_path / "deep")
    assert differences(memory_state_dict(deep), memory_state_dict(other)) == []


def test_place_that_no_folder_is_at_is_named():
    for place in (None, "s3://bucket/checkpoint"):
        with pytest.raises(ValueError, match=r"checkpoint_id=.*pass the storage_reader"):
            load_memory(converted("residual"), place)


def test_checkpoint_that_is_not_there_is_not_found(tmp_path):
    assert "missing" in refused(FileNotFoundError, trained("residual", 0), tmp_path / "missing")
