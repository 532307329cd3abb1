"""The networks of the study, each described by a frozen dataclass that builds it with new weights.

The dataclass's `repr` contains all that determines a network. Weights are drawn from the global
generator. Every network ends in a layer `head`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memaop_triton.bench.suites.models import TransformerBlock

_HEAD_COLUMNS = 64  # of one attention head
_STD = 0.02


class Network(Protocol):
    """Describes a network; its `repr` contains all that determines one."""

    def build(self) -> nn.Module:
        """The network, with new weights or pretrained ones."""
        ...


@dataclass(frozen=True)
class Mlp:
    """Linear layers of these sizes with ReLU between them, weights as PyTorch draws them."""

    sizes: tuple[int, ...]

    def build(self) -> nn.Module:
        """[B, sizes[0]] to [B, sizes[-1]]."""
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        *pairs, last = zip(self.sizes, self.sizes[1:], strict=False)
        for number, (inputs, outputs) in enumerate(pairs, start=1):
            layers[f"hidden{number}"] = nn.Linear(inputs, outputs)
            layers[f"relu{number}"] = nn.ReLU()
        layers["head"] = nn.Linear(*last)
        return nn.Sequential(layers)


@dataclass(frozen=True)
class Gpt:
    """A GPT of pre-norm blocks with learned positions; weights from N(0, 0.02²), biases zero."""

    width: int
    depth: int
    context: int = 128
    vocabulary: int = 65

    def build(self) -> nn.Module:
        """[B, T] tokens (int64) to [B, T, vocabulary]."""
        return _Gpt(self)


@dataclass(frozen=True)
class Vit:
    """A ViT on square grey images, the mean of its tokens classified; weights as `Gpt`'s."""

    width: int
    depth: int
    side: int = 28
    patch: int = 7
    classes: int = 10

    def build(self) -> nn.Module:
        """[B, side²] pixels to [B, classes]."""
        return _Vit(self)


@dataclass(frozen=True)
class ResNet:
    """ResNet-18's four stages of two blocks on square grey images, weights as PyTorch draws them.

    The stem is a convolution of 3 × 3 that halves the side. The first stage has `width` channels,
    and each next one twice as many at half the side.
    """

    width: int
    side: int = 28
    classes: int = 10

    def build(self) -> nn.Module:
        """[B, side²] pixels to [B, classes]."""
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["image"] = nn.Unflatten(1, (1, self.side, self.side))
        layers["stem"] = _conv(1, self.width, 3, stride=2)
        layers["norm"], layers["relu"] = nn.BatchNorm2d(self.width), nn.ReLU()
        inputs = self.width
        for stage, factor in enumerate((1, 2, 4, 8), start=1):
            outputs = factor * self.width
            first = _Residual(inputs, outputs, 1 if stage == 1 else 2)
            layers[f"stage{stage}"] = nn.Sequential(first, _Residual(outputs, outputs, 1))
            inputs = outputs
        layers["pool"], layers["flat"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        layers["head"] = nn.Linear(inputs, self.classes)
        return nn.Sequential(layers)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = _conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            shortcut = _conv(inputs, outputs, 1, stride)
            self.shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def _blocks(width: int, depth: int, *, causal: bool) -> nn.Sequential:
    heads = max(1, width // _HEAD_COLUMNS)
    return nn.Sequential(*(TransformerBlock(width, heads, causal=causal) for _ in range(depth)))


def _draw(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


class _Gpt(nn.Module):
    def __init__(self, sizes: Gpt) -> None:
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocabulary, sizes.width)
        self.positions = nn.Embedding(sizes.context, sizes.width)
        self.blocks = _blocks(sizes.width, sizes.depth, causal=True)
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary)
        self.apply(_draw)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        out: Tensor = self.head(self.norm(self.blocks(x)))
        return out


class _Vit(nn.Module):
    def __init__(self, sizes: Vit) -> None:
        super().__init__()
        self.side, self.patch = sizes.side, sizes.patch
        count = (sizes.side // sizes.patch) ** 2
        self.patches = nn.Linear(sizes.patch**2, sizes.width)
        self.positions = nn.Parameter(torch.empty(count, sizes.width).normal_(std=_STD))
        self.blocks = _blocks(sizes.width, sizes.depth, causal=False)
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.classes)
        self.apply(_draw)

    def forward(self, pixels: Tensor) -> Tensor:
        along = self.side // self.patch
        cut = pixels.view(-1, along, self.patch, along, self.patch).transpose(2, 3)
        x = self.patches(cut.reshape(len(pixels), along**2, self.patch**2)) + self.positions
        out: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return out
