"""A multilayer perceptron that learns images.

Learning rates, initial weights and pixels are such that the dense network's accuracy rises
steadily; they were chosen on that network alone. A step overshoots where the curvature of the loss
is above 2 / (learning rate). With pixels in [0, 1] and PyTorch's initial weights, which make the
signal smaller from layer to layer, the curvature starts near zero and reaches 7, the limit at a
rate of 0.3, some twenty steps later in the middle of training: accuracy then fell by up to 60
points. Therefore pixels are standardised, and weights start with He's variance (arXiv 1502.01852):
then the curvature is largest before the first step, when no accuracy can be lost.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from typing import Literal

from torch import nn, optim

from memaop_triton import MemAOPConfig
from memaop_triton.experiments.data import CLASSES, Examples
from memaop_triton.experiments.demo.training import HEAD, Scheme, Training, check_batch

#: The largest tried at which dense never fell by more than three points below its best on digits.
LEARNING_RATES = {"sgd": 0.05, "adam": 3e-4}
OPTIMIZERS = {"sgd": optim.SGD, "adam": optim.Adam}
_EVALUATIONS = 20


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to train: `epochs` of batches of `batch_size` rows, `seeds` times.

    `optimizer` is a key of `OPTIMIZERS`, `lr` its constant learning rate, by default that of
    `LEARNING_RATES`. In 120 epochs of digits "auto" has decided half-way.
    """

    dataset: str = "digits"
    ratio: float = 0.125
    seeds: int = 2
    epochs: int = 120
    batch_size: int = 1024
    width: int = 1024
    optimizer: str = "sgd"
    lr: float | None = None


def schemes(ratio: float) -> list[Scheme]:
    """Dense, "auto", and the default and the paper's way to compute K = `ratio`·M rows."""
    return [
        Scheme("dense", "dense", None),
        Scheme("auto", "auto (it decides)", MemAOPConfig(ratio="auto")),
        Scheme("default", "priority + subspace", MemAOPConfig(ratio=ratio)),
        Scheme("paper", "topk + residual", MemAOPConfig.paper(ratio=ratio)),
    ]


def training(settings: Settings, images: Examples) -> Training:
    """The training that the settings describe.

    Raises:
        CommandError: A batch is larger than the training set.
    """
    rows = len(images.x_train)
    check_batch(settings.batch_size, rows, "images")
    lr = settings.lr or LEARNING_RATES[settings.optimizer]
    optimizer = OPTIMIZERS[settings.optimizer]
    batch, width = settings.batch_size, settings.width
    updated = f"{optimizer.__name__} at {lr:g}"
    return Training(
        name=f"{settings.dataset}_{settings.optimizer}",
        title=f"{settings.dataset}: K/M = {settings.ratio:g}, batch {batch}, width {width}, "
        f"{updated}, {settings.epochs} epochs",
        network=f"{settings.dataset}: three hidden layers of {width} units, dW from "
        f"{100 * settings.ratio:.3g} % of the rows where the ratio is fixed\n"
        f"batches of {batch}, {updated}",
        settings={"task": "mlp", **dataclasses.asdict(settings), "lr": lr},
        schemes=schemes(settings.ratio),
        data=standardise(images),
        batch_size=batch,
        steps=settings.epochs * rows // batch,
        seeds=settings.seeds,
        evaluations=_EVALUATIONS,
        build=functools.partial(build_model, images.x_train.shape[1], width),
        optimizer=functools.partial(optimizer, lr=lr),
        is_decaying=False,
    )


def standardise(data: Examples) -> Examples:
    """The images with mean 0 and variance 1 over all pixels of the training set."""
    mean, sd = data.x_train.mean(), data.x_train.std()
    return data._replace(x_train=(data.x_train - mean) / sd, x_test=(data.x_test - mean) / sd)


def build_model(inputs: int, width: int) -> nn.Sequential:
    """A network of three hidden layers of `width` ReLU units and a `head` of ten outputs.

    Weights have variance 2 / inputs below a ReLU and 1 / inputs in the head, biases are zero.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, size in enumerate((inputs, width, width), start=1):
        layers[f"hidden{number}"] = _linear(size, width, "relu")
        layers[f"relu{number}"] = nn.ReLU()
    layers[HEAD] = _linear(width, CLASSES, "linear")
    return nn.Sequential(layers)


def _linear(inputs: int, outputs: int, followed_by: Literal["relu", "linear"]) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.kaiming_normal_(layer.weight, nonlinearity=followed_by)
    nn.init.zeros_(layer.bias)
    return layer
