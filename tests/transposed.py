"""A stand-in for `transformers.pytorch_utils.Conv1D`, for tests that do without transformers."""

import sys
import types

import torch
from torch import nn


class Conv1D(nn.Module):
    """y = x W + b, W being [nx, nf]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def __repr__(self):
        return f"Conv1D(nf={self.nf}, nx={self.nx})"

    def forward(self, x):
        return (x.flatten(0, -2) @ self.weight + self.bias).unflatten(0, x.shape[:-1])


def register(modules=sys.modules):
    """Make it the one that the library finds."""
    module = types.ModuleType("transformers.pytorch_utils")
    module.Conv1D = Conv1D
    modules[module.__name__] = module


def twin_of(conv):
    """An `nn.Linear` that computes the same."""
    linear = nn.Linear(conv.nx, conv.nf)
    linear.weight.data = conv.weight.detach().t().contiguous()
    linear.bias.data = conv.bias.detach().clone()
    return linear
