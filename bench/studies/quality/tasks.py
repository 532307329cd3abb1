"""What is trained: data, network, optimizer, length, and how the result is judged.

Learning rates were tuned for the dense network (`python -m bench.studies.quality tune`) and are
kept for every scheme.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from memaop_triton.bench.studies.quality.networks import Gpt, Mlp, Network, ResNet, Vit
from memaop_triton.experiments.bert import MiniLm

Metric = Literal["accuracy", "loss"]

_IMAGES = 60_000
_SMALL = Mlp((784, 256, 256, 10))
_WIDE = Mlp((784, 1024, 1024, 10))


@dataclass(frozen=True)
class Optimizer:
    """An optimizer and the course of its learning rate.

    Attributes:
        kind: Its name.
        lr: The learning rate, at its highest.
        betas: Of Adam and AdamW.
        weight_decay: Of matrices.
        warmup: Share of the steps in which the rate grows from zero.
        floor: What a cosine takes the rate down to, as a share; 1 keeps it constant.
        clip: Norm to which a longer gradient of all Parameters is cut; `None` cuts nothing.
    """

    kind: Literal["sgd", "adam", "adamw"]
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup: float = 0.0
    floor: float = 1.0
    clip: float | None = None

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a model's Parameters."""
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        if self.kind == "sgd":
            return torch.optim.SGD(groups, lr=self.lr)
        kind = torch.optim.Adam if self.kind == "adam" else torch.optim.AdamW
        return kind(groups, lr=self.lr, betas=self.betas)

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by in step `step` (from 0) of `steps`."""
        warmup = round(self.warmup * steps)
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Task:
    """One training problem; its `repr` holds all that determines a result.

    Attributes:
        name: Key on the command line and in files.
        title: For readers.
        data: Which data set.
        network: What is trained.
        optimizer: How.
        batch: Images, or sequences of the network's context.
        steps: Length of a run.
        metric: What counts: accuracy in %, or loss; the name of the field in a `Score`.
        left_dense: Layers that no scheme converts. The output layer: it has few columns, so that
            scoring its rows costs as much as its gradient.
    """

    name: str
    title: str = field(repr=False)
    data: str
    network: Network
    optimizer: Optimizer
    batch: int
    steps: int
    metric: Metric
    left_dense: tuple[str, ...] = ("head",)

    @property
    def sign(self) -> int:
        """1 if more of the metric is better, −1 if less is."""
        return 1 if self.metric == "accuracy" else -1

    def located(self, data_dir: Path | None) -> Task:
        """The same with pretrained weights, if it has any, read from a data directory."""
        if not isinstance(self.network, MiniLm):
            return self
        return dataclasses.replace(self, network=dataclasses.replace(self.network, folder=data_dir))


def _epochs(count: float, batch: int) -> int:
    return round(count * (_IMAGES // batch))


def _transformer(lr: float) -> Optimizer:
    return Optimizer("adamw", lr, (0.9, 0.99), 0.1, warmup=0.1, floor=0.1, clip=1.0)


def _mnist(optimizer: Optimizer) -> Task:
    name, title = f"mnist-{optimizer.kind}", "MNIST, MLP 784-256-256-10, "
    title += "SGD" if optimizer.kind == "sgd" else "Adam"
    return Task(name, title, "mnist", _SMALL, optimizer, 256, _epochs(4, 256), "accuracy")


def _fashion(name: str, batch: int, epochs: float, lr: float) -> Task:
    title = "Fashion-MNIST, MLP 784-1024-1024-10, Adam"
    title += f", {batch:,} images a step" if batch != 256 else ""
    optimizer, steps = Optimizer("adam", lr, floor=0.0), _epochs(epochs, batch)
    return Task(name, title, "fashion_mnist", _WIDE, optimizer, batch, steps, "accuracy")


def _vit(name: str, batch: int, epochs: float, lr: float) -> Task:
    title = "Fashion-MNIST, ViT of 16 tokens, d=128, 3 layers"
    title += f", {batch:,} images a step" if batch != 128 else ""
    steps, network = _epochs(epochs, batch), Vit(128, 3)
    return Task(name, title, "fashion_mnist", network, _transformer(lr), batch, steps, "accuracy")


def _gpt(name: str, network: Gpt, steps: int, lr: float, batch: int = 16) -> Task:
    title = f"Character GPT, d={network.width}, {network.depth} layers, {steps:,} steps"
    title += f" of {batch} sequences" if batch != 16 else ""
    return Task(name, title, "tinyshakespeare", network, _transformer(lr), batch, steps, "loss")


def _deep_mlp(name: str, data: str, title: str, batch: int, epochs: float, lr: float) -> Task:
    title = f"{title}, MLP of three hidden layers of 1024, Adam, {batch:,} images a step"
    network, optimizer = Mlp((784, 1024, 1024, 1024, 10)), Optimizer("adam", lr, floor=0.0)
    return Task(name, title, data, network, optimizer, batch, _epochs(epochs, batch), "loss")


def _fine_tuning(name: str, data: str, title: str, steps: int, network: MiniLm) -> Task:
    """At the usual rate, 2,048 tokens a step, judged by the loss, which takes fewer seeds."""
    title = f"BERT (MiniLM, 6 layers, d=384), pretrained, on {title}, {network.pooling} pooling"
    optimizer = Optimizer("adamw", 1e-4, weight_decay=0.01, floor=0.0)
    return Task(name, title, data, network, optimizer, 32, steps, "loss")


def _resnet(name: str, batch: int, epochs: float, lr: float) -> Task:
    title = f"Fashion-MNIST, ResNet-18 of width 64, Adam, {batch} images a step"
    network, optimizer = ResNet(64), Optimizer("adam", lr, floor=0.0)
    steps = _epochs(epochs, batch)
    return Task(name, title, "fashion_mnist", network, optimizer, batch, steps, "accuracy")


_NEWS = "newsgroups20", "20 Newsgroups", 170
_R8 = "reuters_r8", "Reuters R8", 100

TASKS = {
    task.name: task
    for task in (
        _mnist(Optimizer("sgd", 0.8, floor=0.0)),
        _mnist(Optimizer("adam", 8e-3, floor=0.0)),
        _fashion("fashion", 256, 4, 2e-3),
        _gpt("gpt-128", Gpt(128, 4), 600, 4e-3),
        _vit("vit", 128, 1.25, 5e-4),
        _gpt("gpt-512", Gpt(512, 2), 600, 1e-3),
        _gpt("gpt-256", Gpt(256, 4), 1000, 2e-3),
        # At the small batch's rate, so that nothing differs but how noisy a step is.
        _gpt("gpt-128-64", Gpt(128, 4), 600, 4e-3, batch=64),
        _gpt("gpt-128-256", Gpt(128, 4), 600, 4e-3, batch=256),
        # Four times the batch: in as many epochs, and in as many steps.
        _fashion("fashion-1024", 1024, 4, 4e-3),
        _vit("vit-512", 512, 5, 2e-3),
        # Of the first, most rows count; the second network is nearly always right, and few do. The
        # third sees no image twice, so that more images are worth something until the end.
        _deep_mlp("mlp", "fashion_mnist", "Fashion-MNIST", 2048, 8, 4e-3),
        _deep_mlp("mlp-mnist", "mnist", "MNIST", 1024, 4, 2e-3),
        _deep_mlp("mlp-shifted", "mnist-shifted", "MNIST shifted at random", 1024, 8, 2e-3),
        _resnet("resnet", 256, 0.5, 1e-3),
        _fine_tuning("minilm", *_NEWS, MiniLm()),
        _fine_tuning("minilm-mean", *_NEWS, MiniLm(pooling="mean")),
        _fine_tuning("r8", *_R8, MiniLm(classes=8)),
        _fine_tuning("r8-mean", *_R8, MiniLm(classes=8, pooling="mean")),
        # Half of each sequence is a prompt, which is not predicted.
        dataclasses.replace(
            _gpt("gpt-prompted", Gpt(128, 4), 600, 4e-3),
            title="Character GPT, d=128, 4 layers, 600 steps, half of each sequence a prompt",
            data="tinyshakespeare-prompted",
        ),
    )
}
