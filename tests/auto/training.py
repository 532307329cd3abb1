"""A training whose time is computed instead of measured."""

import itertools
from types import SimpleNamespace

import torch
from torch import nn

from memaop_triton import MemAOPConfig, convert_
from memaop_triton.auto import clock
from memaop_triton.auto.savings import Savings

N = 16


def steps_of_a_second(monkeypatch):
    """Every step of an optimizer takes a second of the clock, on a machine that is busy too."""
    fake = SimpleNamespace(perf_counter=itertools.count(0.0).__next__)
    monkeypatch.setattr(clock, "time", fake)


class Training:
    """A small net that learns a linear map, and a clock that goes forward by what a step takes.

    Args:
        rows: Of a batch.
        noise: Of the targets, whose gradients point anywhere.
        true: What a layer's sampled gradient really takes of the dense one's time, by share.
        said: What it is measured to take when it is timed by itself.
        config: Of all layers.
        width: Of them.
        wrap: Makes the model that is called of the converted one, for several processes.

    Attributes:
        modes: Of every step whether something was sampled.
        settling: What the first step of a mode takes in addition.
        look: The same of an observed step.
        scale: Of the seconds of all steps.
        seconds: Of every step.
    """

    def __init__(
        self,
        monkeypatch,
        rows,
        noise,
        true,
        said=None,
        config=None,
        width=N,
        wrap=lambda model: model,
    ):
        self.now, self.rows, self.noise, self.true = 0.0, rows, noise, true
        self.modes, self.seconds = [], []
        self.settling, self.look, self.scale = 0.0, 0.0, 1.0
        fake = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(clock, "time", fake)

        def measured(savings, use, configs):
            return {share: 1.0 if share == 1 else (said or true)(share) for share in configs}

        monkeypatch.setattr(Savings, "_measured", measured)
        torch.manual_seed(0)
        self.target = nn.Linear(width, width)
        self.model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        convert_(self.model, config or MemAOPConfig(ratio="auto", memory="none"))
        self.linears = self.model[0], self.model[2]
        self.model = wrap(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)

    @property
    def controller(self):
        return self.linears[0].layer_state.controller

    def loss(self):
        x = torch.randn(self.rows, self.target.in_features)
        with torch.no_grad():
            y = self.target(x)
        y = y + self.noise * torch.randn_like(y)
        return (self.model(x) - y).square().mean()

    def backward(self):
        self.loss().backward()

    def step(self, count=1):
        for _ in range(count):
            self.optimizer.zero_grad()
            self.backward()
            ratios = [layer.config.ratio for layer in self.linears]
            self.modes.append(max(1 / r for r in ratios) > 1)
            # A third of the time is that of the layers' weight gradients.
            seconds = 4.0 + sum(1.0 if r == 1 else self.true(r) for r in ratios)
            if self.modes[-2:] in ([False, True], [True, False]):
                seconds += self.settling
            if self.linears[0].layer_state.step_observer is not None:
                seconds += self.look / self.scale
            self.seconds.append(self.scale * seconds)
            self.now += self.seconds[-1]
            self.optimizer.step()
