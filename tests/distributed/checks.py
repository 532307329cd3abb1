"""Runs checks in every process of a group, and has what they share.

    python -m torch.distributed.run --standalone --nproc-per-node=2 -m tests.distributed.checks ddp

runs the functions `check_…` of `ddp.py` in two processes; there may be more files.
"""

import contextlib
import importlib
import os
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from memaop_triton import MemAOPConfig, convert_
from memaop_triton.auto import agenda
from tests.auto.training import steps_of_a_second

PAPER = MemAOPConfig.paper(k=4)


def run(files):
    """Run the checks of some files. A process that fails ends, and the launcher ends the others."""
    warnings.simplefilter("error")
    # PyTorch's own: on its hooks and compilers, on what DCP does with `requires_grad`.
    warnings.filterwarnings("ignore", module="torch")
    torch.set_num_threads(1)
    agenda.LEFT_ALONE = 0.0  # the first seconds are looked at too
    steps_of_a_second(pytest.MonkeyPatch())
    dist.init_process_group("gloo")
    for file in files:
        module = importlib.import_module(f"tests.distributed.{file}")
        for name, check in list(vars(module).items()):
            if name.startswith("check_") and check.__module__ == module.__name__:
                seed()
                check()
                if dist.get_rank() == 0:
                    print("passed", file, name, flush=True)
    leave()


def leave():
    """Ends this process, with success, once all of its group are here.

    What holds a group in a circle (DDP's reducer, a device mesh) is not collected before the
    interpreter ends, where gloo's threads are then sometimes destroyed while they run. That aborts
    the process, so the interpreter's teardown is skipped.
    """
    with contextlib.suppress(RuntimeError):  # a process that failed has closed its connections
        dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextlib.contextmanager
def case(name):
    """An assertion that fails inside says in which case of a table it did."""
    try:
        yield
    except AssertionError as error:
        error.add_note(f"in the case of {name}")
        raise


def seed():
    """From now on this process draws what no other one draws."""
    torch.manual_seed(100 + int(os.environ["RANK"]))


def shared_folder():
    """A new folder, the same one in every process."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    return Path(folder[0])


def mlp(dtype=torch.float64, bias=True, sizes=(12, 8, 6), model_seed=0):
    """Two linear layers, the same in every process."""
    first, hidden, last = sizes
    torch.manual_seed(model_seed)
    layers = nn.Linear(first, hidden, bias), nn.Tanh(), nn.Linear(hidden, last, bias)
    model = nn.Sequential(*layers).to(dtype)
    seed()
    return model


def converted(model, config=PAPER):
    return convert_(model, config)


def batch(*shape, dtype=torch.float64, step=0):
    """Numbers that are the same in every process, rows of very different lengths."""
    draws = torch.Generator().manual_seed(1000 + step)
    rows = torch.randn(shape, generator=draws)
    return (rows * torch.rand((*shape[:-1], 1), generator=draws).mul(3).exp()).to(dtype)


def everywhere(a, group=None):
    """The tensor of every process of the group, stacked."""
    parts = [torch.empty_like(a) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, a.contiguous(), group=group)
    return torch.stack(parts)


def same_everywhere(a, group=None):
    parts = everywhere(a.double(), group)
    return bool((parts == parts[0]).all())


def whole(a):
    """A plain tensor from a plain one or a DTensor."""
    return a.full_tensor() if hasattr(a, "full_tensor") else a


if __name__ == "__main__":
    run(sys.argv[1:])
