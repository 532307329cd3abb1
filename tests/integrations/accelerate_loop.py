"""A small net in a training loop of Accelerate, with converted layers."""

import os
import signal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from memaop_triton import MemAOPConfig, Rows, attach_optimizer, convert_, memory_state_dict
from memaop_triton.integrations.accelerate import MemAOPState

BATCHES = 5
CONFIG = MemAOPConfig(ratio=1 / 4, selection="topk", memory=Rows(signed=True))


class Run:
    """A training, with everything that a checkpoint has to hold."""

    def __init__(self, config=CONFIG, seed=0):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        self.accelerator = Accelerator(cpu=True)
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
        self.net = convert_(net, config)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(
            net, optimizer, scheduler
        )
        attach_optimizer(net, self.optimizer, self.accelerator.scaler)
        self.accelerator.register_for_checkpointing(MemAOPState(self.model))
        rank = self.accelerator.process_index
        torch.manual_seed(seed + 1000 * rank)
        draws = torch.Generator().manual_seed(5 + rank)
        x = torch.randn(16 * BATCHES, 12, generator=draws)
        self.batches = list(DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=16))

    def step(self, number):
        x, y = self.batches[number % BATCHES]
        self.optimizer.zero_grad()
        self.accelerator.backward(F.cross_entropy(self.model(x), y))
        self.optimizer.step()
        self.scheduler.step()


def train(folder, steps, resume_at=None, kill_at=None):
    """Train, from the checkpoint of a step if one is given, and return what came of it."""
    run = Run(seed=0 if resume_at is None else 50)
    if resume_at is not None:
        run.accelerator.load_state(str(folder / f"step={resume_at}"))
    for step in range(resume_at or 0, steps):
        if step == steps // 2 and resume_at is None:
            run.accelerator.save_state(str(folder / f"step={step}"))
        if step == kill_at:
            run.accelerator.wait_for_everyone()
            os.kill(os.getpid(), signal.SIGKILL)
        run.step(step)
    return {
        "model": run.net.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "memories": memory_state_dict(run.net),
        "draws": torch.get_rng_state(),
    }
