"""Trains small nets, saves everything half-way, and goes on from there in another process.

Run as a script, by itself or by torchrun: `resume_worker.py {killed,resumed} FOLDER`.

killed    Trains each net of `cases` for `SAVED_AT` steps and saves it, and is killed.
resumed   Trains each net from its checkpoint on to `STEPS` steps, and compares it with one that was
          never interrupted.
"""

import os
import signal
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from memaop_triton import attach_optimizer, convert_, memory_state_dict
from memaop_triton.distributed.checkpoint import load_memory, memory_entries
from tests.distributed.checks import case, leave
from tests.schemes import flat_config

SAVED_AT = 5
STEPS = 9
PRIORITY = {"selection": "priority", "memory": "subspace"}
SIGNED = {"selection": "weightedk", "memory": "signed"}
RESIDUAL = {"selection": "topk", "memory": "residual"}


def cases():
    """What is trained, by name.

    That every scheme goes on within a process is in `tests/nn/test_state.py`.
    """
    special = {
        "signed": SIGNED,
        "residual": RESIDUAL | {"decay": 0.5},
        "adam": PRIORITY | {"adam": True},
        "adam rows": SIGNED | {"adam": True},
        "sampled compiled": PRIORITY | {"grad_input": "sampled", "compiled": "aot_eager"},
        "rows compiled": RESIDUAL | {"compiled": "aot_eager"},
        "half": SIGNED | {"dtype": torch.bfloat16},
        "overflow": PRIORITY | {"overflow": True},
        "overflow rows": RESIDUAL | {"overflow": True},
        "no memory": {"selection": "crs", "memory": "none", "grad_input": "sampled"},
        "projected": PRIORITY | {"grad_input": "projected"},
    }
    if dist.is_initialized():  # a compiler that takes seconds is tried in one process
        return special
    return special | {
        "inductor": PRIORITY | {"compiled": "inductor"},
        "inductor rows": SIGNED | {"compiled": "inductor"},
        "signed compiled": SIGNED | {"compiled": "aot_eager"},
        "no memory compiled": {"memory": "none", "compiled": "aot_eager"},
    }


class Run:
    """A net in training, with everything that a checkpoint has to hold."""

    def __init__(self, scheme, seed):
        scheme = dict(scheme)
        self.overflow = scheme.pop("overflow", False)
        self.compiled = scheme.pop("compiled", None)
        adam = scheme.pop("adam", False)
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 2))
        self.net = convert_(net, flat_config(k=3, rank=2, refresh_every=3, **scheme))
        self.call, self.rank = self.net, 0
        if self.compiled:
            self.call = torch.compile(self.net, backend=self.compiled, fullgraph=True)
        if dist.is_initialized():
            self.call, self.rank = DistributedDataParallel(self.call), dist.get_rank()
            torch.manual_seed(seed + 1000 * self.rank)
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        if adam:
            self.optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.8)
        self.step = 0

    def train(self, until):
        attach_optimizer(self.net, self.optimizer)
        while self.step < until:
            self.train_step()

    def train_step(self):
        """One step on data that the step's number determines; each rank has its own."""
        draws = torch.Generator().manual_seed(100 * self.step + self.rank)
        # Slots beyond the later batches stay as they were saved. A graph would be compiled again
        # for another batch.
        rows = 17 if self.compiled else (21 if self.step < 2 else 13 + 4 * (self.step % 2))
        rows += 2 * self.rank
        x, y = torch.randn(rows, 12, generator=draws), torch.randn(rows, 2, generator=draws)
        if self.overflow and self.step == 3:
            x[2] = torch.inf
        self.optimizer.zero_grad()
        (self.call(x) - y).square().mean().backward()
        if all(p.grad.isfinite().all() for p in self.net.parameters()):
            self.optimizer.step()
        self.scheduler.step()
        self.step += 1

    def state(self):
        """Everything but the memories."""
        net, optimizer = get_state_dict(self.net, self.optimizer)
        return {
            "net": net,
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            f"random.{self.rank}": torch.get_rng_state(),
            "step": self.step,
        }

    def save(self, path):
        dcp.save(self.state() | memory_entries(self.net), checkpoint_id=path)

    def load(self, path):
        state = self.state()
        dcp.load(state, checkpoint_id=path)
        set_state_dict(
            self.net,
            self.optimizer,
            model_state_dict=state["net"],
            optim_state_dict=state["optimizer"],
        )
        load_memory(self.net, path)
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state[f"random.{self.rank}"])
        self.step = state["step"]


def killed(path, scheme, seed):
    run = Run(scheme, seed)
    run.train(SAVED_AT)
    run.save(path)


def resumed(path, scheme, seed):
    """Fail unless the resumed run ends as the uninterrupted one to the bit."""
    # Other weights and draws than those of the run it continues.
    run = Run(scheme, seed + 50)
    run.load(path)
    assert run.step == SAVED_AT
    run.train(STEPS)
    outcome = run.state()
    whole = Run(scheme, seed)
    whole.train(STEPS)
    assert differences(whole.state(), outcome) == []
    assert differences(memory_state_dict(whole.net), memory_state_dict(run.net)) == []


def differences(one, other, path=""):
    """Where two nested outcomes differ in a bit, NaN being equal to itself."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{path} (keys)"]
        return [d for key in one for d in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        bits = (a.contiguous().flatten().view(torch.uint8) for a in (one, other))
        return [] if same and torch.equal(*bits) else [path]
    return [] if one == other or (one != one and other != other) else [path]


def main(mode, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # PyTorch's own: on what DCP does with `requires_grad`, on how DDP is compiled.
    warnings.filterwarnings("ignore", module=r"torch\.")
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    for seed, (name, scheme) in enumerate(cases().items()):
        with case(name):
            {"killed": killed, "resumed": resumed}[mode](folder / name, scheme, seed)
    if dist.is_initialized():
        dist.barrier()
    if mode == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if dist.is_initialized():
        leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
