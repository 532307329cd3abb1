"""What two ranks do with checkpoints of their memories: `checkpoint_worker.py FOLDER CHECK...`.

Every check is a function here and gets a folder of its own.
"""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from memaop_triton import convert_, memory_state_dict
from memaop_triton.distributed.checkpoint import load_memory, memory_entries, save_memory
from tests.distributed.checks import leave
from tests.resume_worker import differences
from tests.schemes import flat_config

SCHEMES = {
    "none": {"selection": "priority", "memory": "none"},
    "residual": {"selection": "topk", "memory": "residual"},
    "signed": {"selection": "topk", "memory": "signed"},
    "subspace": {"selection": "priority", "memory": "subspace"},
}


def converted(memory, outputs=2, **config):
    net = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, outputs))
    return convert_(net, flat_config(k=3, rank=2, **(SCHEMES[memory] | config)))


def backward(model, rows):
    model(torch.randn(rows, 12)).square().sum().backward()
    return model


def trained(memory, rank):
    """Of other contents and numbers of rows on each rank."""
    torch.manual_seed(rank)
    return backward(backward(converted(memory), 13 + 4 * rank), 7)


def refused(kind, model, *args):
    """The message of the error that this rank gets; the memories of `model` stay."""
    before = {name: dict(state) for name, state in memory_state_dict(model).items()}
    try:
        load_memory(model, *args)
    except kind as error:
        assert differences(before, memory_state_dict(model)) == []
        return str(error)
    raise AssertionError("nothing was raised")


def round_trip(folder, rank):
    for memory in SCHEMES:
        model = trained(memory, rank)
        save_memory(model, folder / memory)
        other = backward(converted(memory), 30)
        load_memory(other, folder / memory)
        assert differences(memory_state_dict(model), memory_state_dict(other)) == []


def before_the_first_step(folder, rank):
    for memory in SCHEMES:
        # One rank has seen a batch, the other has not.
        model = converted(memory)
        if rank == 1:
            backward(model, 17)
        save_memory(model, folder / memory)
        other = backward(converted(memory), 30)
        load_memory(other, folder / memory)
        assert differences(memory_state_dict(model), memory_state_dict(other)) == []


def beside_the_model(folder, rank):
    model = trained("residual", rank)
    dcp.save({"model": model.state_dict()} | memory_entries(model), checkpoint_id=folder / "all")
    other = converted("residual")
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=folder / "all")
    load_memory(other, folder / "all")
    assert differences(memory_state_dict(model), memory_state_dict(other)) == []


def other_models(folder, rank):
    model = trained("residual", rank)
    save_memory(model, folder / "checkpoint")
    cases = {
        "state does not fit the model: missing ['1']": nn.Sequential(
            *converted("residual")[::2], nn.ReLU()
        ),
        "memory of layer '2': g has shape": converted("residual", outputs=3),
        "'residual' memory, this one is 'signed'": converted("signed"),
        "memory of layer '0': state is of a 'residual' memory": converted("subspace"),
        "unknown ['0', '2']": converted("none"),
    }
    for message, other in cases.items():
        assert message in refused(ValueError, other, folder / "checkpoint")


def one_rank_differs(folder, rank):
    save_memory(trained("residual", rank), folder / "checkpoint")
    other = backward(converted("residual", outputs=2 if rank == 0 else 3), 5)
    message = refused(ValueError, other, folder / "checkpoint")
    assert "memory of layer '2': g has shape" in message
    assert message.startswith("rank 1: ") == (rank == 0)


def unreadable_on_one_rank(folder, rank):
    save_memory(trained("residual", rank), folder / "checkpoint")
    here = folder / ("checkpoint" if rank == 0 else "missing")
    kind = RuntimeError if rank == 0 else FileNotFoundError
    assert "missing" in refused(kind, trained("residual", rank), here)


def damaged_on_one_rank(folder, rank):
    save_memory(trained("residual", rank), folder / "checkpoint")
    dist.barrier()
    if rank == 1:
        for file in (folder / "checkpoint").glob("__1_*"):
            file.unlink()
    dist.barrier()
    kind = RuntimeError if rank == 0 else BaseException
    assert "__1_" in refused(kind, trained("residual", rank), folder / "checkpoint")


def no_memories(folder, rank):
    dcp.save({"model": converted("none").state_dict()}, checkpoint_id=folder / "checkpoint")
    message = refused(ValueError, trained("residual", rank), folder / "checkpoint")
    assert "holds no memories" in message


def more_ranks(folder, rank):
    """The checkpoint is of one process."""
    starts_empty(folder / "single", "saved by 1 ranks and this run has 2")


def save_for_one(folder, rank):
    save_memory(trained("residual", rank), folder / "both")


def groups_of_one(folder, rank):
    groups = [dist.new_group([0]), dist.new_group([1])]
    model, mine = trained("signed", rank), {"process_group": groups[rank]}
    save_memory(model, folder / f"checkpoint{rank}", **mine)
    other = converted("signed")
    load_memory(other, folder / f"checkpoint{rank}", **mine)
    assert differences(memory_state_dict(model), memory_state_dict(other)) == []


def starts_empty(path, message):
    model = backward(converted("residual"), 17)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_memory(model, path)
    assert [str(w.message) for w in caught if message in str(w.message)]
    assert all(layer.memory.nbytes == 0 for layer in model[::2])


if __name__ == "__main__":
    dist.init_process_group("gloo")
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module=r"torch\.")
    for check in sys.argv[2:]:
        globals()[check](Path(sys.argv[1]) / check, dist.get_rank())
    leave()
