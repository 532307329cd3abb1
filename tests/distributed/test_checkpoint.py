"""Checkpoints of the memories of one process, which needs no process group."""

import pytest
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from memaop_triton import memory_state_dict
from memaop_triton.config.parts import MEMORIES
from memaop_triton.distributed.checkpoint import load_memory, memory_entries
from tests.distributed.checkpoint import comes_back, converted, refused, save, trained
from tests.distributed.resume_worker import differences

# Of `dcp.save`, that a single process saves.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("memory", MEMORIES)
def test_memories_of_one_process_come_back(tmp_path, memory):
    for rank in (0, 1):
        comes_back(trained(memory, rank), converted(memory), tmp_path / f"{rank}")
    # A memory without a step empties the one that loads it.
    save(converted(memory), tmp_path / "empty")
    other = trained(memory, 0)
    load_memory(other, tmp_path / "empty")
    assert all(layer.memory is None or layer.memory.nbytes == 0 for layer in other[::2])


def test_storage_is_the_callers_choice(tmp_path):
    model, other = trained("residual", 0), converted("residual")
    writer = FileSystemWriter(tmp_path, single_file_per_rank=False)
    dcp.save(memory_entries(model), storage_writer=writer)
    load_memory(other, storage_reader=FileSystemReader(tmp_path))
    assert differences(memory_state_dict(model), memory_state_dict(other)) == []
    load_memory(other, tmp_path, storage_reader=FileSystemReader(tmp_path / "elsewhere"))


def test_layers_may_have_any_name(tmp_path):
    """The model itself is its only layer, or a name has dots and ends like that of a tensor."""
    comes_back(trained("residual", 0)[0], converted("residual")[0], tmp_path / "alone")

    def nested(layer):
        return nn.ModuleDict({"x": nn.ModuleDict({"filled": layer}), "rank_0": nn.ReLU()})

    deep, other = nested(trained("residual", 1)[2]), nested(converted("residual")[2])
    comes_back(deep, other, tmp_path / "deep")


def test_place_that_no_checkpoint_is_at_is_named(tmp_path):
    for place in (None, "s3://bucket/checkpoint"):
        with pytest.raises(ValueError, match=r"checkpoint_id=.*pass the storage_reader"):
            load_memory(converted("residual"), place)
    assert "missing" in refused(FileNotFoundError, trained("residual", 0), tmp_path / "missing")
