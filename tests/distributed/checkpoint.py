"""What two ranks do with checkpoints of their memories."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from memaop_triton import convert_, memory_state_dict
from memaop_triton.config.parts import MEMORIES, ROW_MEMORIES
from memaop_triton.distributed.checkpoint import load_memory, memory_entries
from tests.distributed.checks import case, shared_folder
from tests.distributed.resume_worker import differences
from tests.schemes import flat_config


def converted(memory, outputs=2):
    selection = "topk" if memory in ROW_MEMORIES else "priority"
    net = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, outputs))
    return convert_(net, flat_config(k=3, rank=2, selection=selection, memory=memory))


def backward(model, rows):
    model(torch.randn(rows, 12)).square().sum().backward()
    return model


def trained(memory, rank):
    """Of other contents and numbers of rows on each rank."""
    torch.manual_seed(rank)
    return backward(backward(converted(memory), 13 + 4 * rank), 7)


def save(model, folder, group=None):
    dcp.save(memory_entries(model, group), checkpoint_id=folder, process_group=group)


def comes_back(model, other, folder, group=None):
    """Save the memories of one model and load them into another one."""
    save(model, folder, group)
    load_memory(other, folder, process_group=group)
    assert differences(memory_state_dict(model), memory_state_dict(other)) == []


def refused(kind, model, folder):
    """The message of the error that this rank gets; the memories of `model` stay."""
    before = {name: dict(state) for name, state in memory_state_dict(model).items()}
    with pytest.raises(kind) as caught:
        load_memory(model, folder)
    assert differences(before, memory_state_dict(model)) == []
    return str(caught.value)


def starts_empty(folder, message, group=None):
    model = backward(converted("residual"), 17)
    with pytest.warns(UserWarning, match=message):
        load_memory(model, folder, process_group=group)
    assert all(layer.memory.nbytes == 0 for layer in model[::2])


def check_every_rank_gets_its_own_memories_back():
    folder, rank = shared_folder(), dist.get_rank()
    for memory in MEMORIES:
        with case(memory):
            comes_back(trained(memory, rank), backward(converted(memory), 30), folder / memory)
            # One rank has seen a batch, the other has not.
            model = converted(memory) if rank == 0 else backward(converted(memory), 17)
            comes_back(model, backward(converted(memory), 30), folder / f"{memory} on one")


def check_other_models_and_checkpoints_without_memories_are_refused():
    folder = shared_folder()
    model = trained("residual", dist.get_rank())
    save(model, folder)
    cases = {
        "state does not fit the model: missing ['1']": nn.Sequential(*model[::2], nn.ReLU()),
        "memory of layer '2': g has shape": converted("residual", outputs=3),
        "state is of a 'residual' memory, this one is 'signed'": converted("signed"),
        "memory of layer '0': state is of a 'residual' memory": converted("subspace"),
        "unknown ['0', '2']": converted("none"),
    }
    for message, other in cases.items():
        assert message in refused(ValueError, other, folder)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "alone")
    assert "holds no memories" in refused(ValueError, model, folder / "alone")


def check_what_fails_on_one_rank_is_raised_on_both():
    folder, rank = shared_folder(), dist.get_rank()
    save(trained("residual", rank), folder)
    other = backward(converted("residual", outputs=2 if rank == 0 else 3), 5)
    message = refused(ValueError, other, folder)
    assert "memory of layer '2': g has shape" in message
    assert message.startswith("rank 1: ") == (rank == 0)

    model = trained("residual", rank)
    kind = RuntimeError if rank == 0 else FileNotFoundError
    assert "missing" in refused(kind, model, folder if rank == 0 else folder / "missing")
    if rank == 1:
        for file in folder.glob("__1_*"):
            file.unlink()
    dist.barrier()
    assert "__1_" in refused(RuntimeError if rank == 0 else BaseException, model, folder)


def check_groups_of_one_and_another_number_of_ranks():
    folder, rank = shared_folder(), dist.get_rank()
    group = [dist.new_group([0]), dist.new_group([1])][rank]
    comes_back(trained("signed", rank), converted("signed"), folder / f"{rank}", group)
    dist.barrier()  # rank 1 may be ahead of rank 0's checkpoint
    starts_empty(folder / "0", "saved by 1 ranks and this run has 2")
    save(trained("residual", rank), folder / "both")
    starts_empty(folder / "both", "saved by 2 ranks and this run has 1", group)
