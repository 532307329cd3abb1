"""The training that a test stops, resumes, scales or spoils."""

import torch
from torch import nn

from memaop_triton import attach_optimizer, convert_

ROWS = 17


def converted(config):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    return convert_(model, config)


def batches(steps, seed=5):
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, ROWS, 12, generator=draws)
    return list(zip(x, torch.randn(steps, ROWS, 2, generator=draws), strict=True))


class Training:
    """A converted model, its optimizer and schedule, and a scaler; 0 as a scale for no scaler.

    The scale doubles every `growth` steps.
    """

    def __init__(self, config, scale=4.0, growth=1, follow_scale=True, dtype=None):
        self.model, self.dtype = converted(config), dtype
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=scale or 1.0, growth_interval=growth, enabled=scale != 0
        )
        attach_optimizer(self.model, self.optimizer, self.scaler if follow_scale else None)

    def step(self, x, y):
        self.optimizer.zero_grad()
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            out = self.model(x)
        loss = (out.float() - y).square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        return loss.item()

    def run(self, data):
        return [self.step(x, y) for x, y in data]

    def parameters(self):
        return [p.detach().clone() for p in self.model.parameters()]
