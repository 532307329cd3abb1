"""What the scripts of this folder share; each runs in every process of a group."""

import contextlib
import os
import sys

import torch
import torch.distributed as dist
from torch import nn

from memaop_triton import MemAOPConfig, convert_

PAPER = MemAOPConfig.paper(k=4)


def run(*checks):
    """Every check in turn. A process that fails ends, and the launcher ends the others."""
    dist.init_process_group("gloo")
    for check in checks:
        torch.manual_seed(100 + dist.get_rank())
        check()
        if dist.get_rank() == 0:
            print("passed", check.__name__, flush=True)
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


def seed():
    """From now on this process draws what no other one draws."""
    torch.manual_seed(100 + int(os.environ["RANK"]))


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


def raises(kind, *words):
    """As `pytest.raises`, for a message that has all these words."""
    return _Raises(kind, words)


class _Raises:
    def __init__(self, kind, words):
        self.kind, self.words = kind, words

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        assert kind is not None, f"no {self.kind.__name__}"
        if not issubclass(kind, self.kind):
            return False
        missing = [word for word in self.words if word not in str(error)]
        assert not missing, f"{missing} not in {error}"
        return True
