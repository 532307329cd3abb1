"""Train one network under several schemes side by side, and time what each of them costs.

With one seed all schemes start from the same weights and get the same batches. They take their
steps in turn, in a new random order for every batch, so that other work on the machine slows them
all alike.

Learning rates, initial weights and pixels are such that the dense network's accuracy rises
steadily; they were chosen on that network alone. A step overshoots where the curvature of the loss
is above 2 / (learning rate). With pixels in [0, 1] and PyTorch's initial weights, which make the
signal smaller from layer to layer, the curvature starts near zero and reaches 7, the limit at a
rate of 0.3, some twenty steps later in the middle of training: accuracy then fell by up to 60
points. Therefore pixels are standardised, and weights start with He's variance (arXiv 1502.01852):
then the curvature is largest before the first step, when no accuracy can be lost.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from memaop_triton import MemAOPConfig, MemAOPLinear, attach_optimizer, convert_
from memaop_triton.backward.weight_grad import weight_grad
from memaop_triton.errors import CommandError
from memaop_triton.experiments.data import CLASSES, Images
from memaop_triton.flops import weight_grad_flops
from memaop_triton.memory.subspace import SubspaceMemory

HEAD = "head"
_EVALUATIONS = 40
_GRADIENT_ROUNDS = 60

#: The largest tried at which dense never fell by more than three points below its best on digits.
LEARNING_RATES = {"sgd": 0.05, "adam": 3e-4}
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One way to compute the weight gradients; `config` is `None` for the dense network."""

    key: str
    label: str
    config: MemAOPConfig | None


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to train: `epochs` of batches of `batch_size` rows, `seeds` times.

    `optimizer` is a key of `OPTIMIZERS`, `lr` its constant learning rate.
    """

    dataset: str
    ratio: float
    seeds: int
    epochs: int
    batch_size: int
    width: int
    optimizer: str
    lr: float


@dataclasses.dataclass
class SchemeResult:
    """The results of one scheme over all seeds.

    Attributes:
        scheme: The scheme.
        steps: Steps taken before each evaluation.
        losses: [seeds, evaluations], the mean training loss since the last evaluation.
        accuracies: [seeds, evaluations], the test accuracy in [0, 1].
        step_seconds: Every training step's time.
        gradient_seconds: Time of all converted layers' weight gradients, once per round.
        gradient_flops: Operations of the same gradients in one step, beside dense's.
        memory_bytes: Held by the memories of the network.
    """

    scheme: Scheme
    steps: list[int]
    losses: list[list[float]] = dataclasses.field(default_factory=list)
    accuracies: list[list[float]] = dataclasses.field(default_factory=list)
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    gradient_seconds: list[float] = dataclasses.field(default_factory=list)
    gradient_flops: float = 1.0
    memory_bytes: int = 0

    @property
    def step_median(self) -> float:
        """Median time of a training step, in seconds."""
        return statistics.median(self.step_seconds)

    @property
    def gradient_median(self) -> float:
        """Median time of the weight gradients of one step, in seconds."""
        return statistics.median(self.gradient_seconds)


#: Called after every evaluation with (scheme key, steps taken over all seeds, test accuracy).
Progress = Callable[[str, int, float], None]


def schemes(ratio: float) -> list[Scheme]:
    """Dense, and four ways to compute K = `ratio`·M of the M outer products."""
    signed = MemAOPConfig(ratio=ratio, selection="topk", memory="signed")
    return [
        Scheme("dense", "dense", None),
        Scheme("default", "priority + subspace", MemAOPConfig(ratio=ratio)),
        Scheme("priority", "priority", MemAOPConfig(ratio=ratio, memory="none")),
        Scheme("paper", "topk + residual", MemAOPConfig.paper(ratio=ratio)),
        Scheme("signed", "topk + signed", signed),
    ]


def standardise(data: Images) -> Images:
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


def total_steps(settings: Settings, data: Images) -> int:
    """Training steps of one seed.

    Raises:
        CommandError: A batch is larger than the training set.
    """
    rows = len(data.x_train)
    if settings.batch_size > rows:
        raise CommandError(
            f"--batch-size={settings.batch_size} exceeds the {rows} training images: take fewer."
        )
    return settings.epochs * rows // settings.batch_size


def run_demo(
    settings: Settings, data: Images, progress: Progress = lambda *_: None
) -> list[SchemeResult]:
    """Train every scheme with every seed; the results are in the order of `schemes`.

    Raises:
        CommandError: The settings do not fit the data.
    """
    steps = total_steps(settings, data)
    every = max(1, steps // _EVALUATIONS)
    evaluations = [*range(every, steps, every), steps]
    data = standardise(data)
    results = [SchemeResult(scheme, evaluations) for scheme in schemes(settings.ratio)]
    for seed in range(settings.seeds):
        torch.manual_seed(seed)
        base = build_model(data.x_train.shape[1], settings.width)
        runners = [_Runner(result, base, settings) for result in results]
        _train(runners, settings.batch_size, data, seed, progress)
    for runner in runners:
        runner.measure_cost(settings.batch_size)
    _time_gradients(runners, data, settings.batch_size)
    return results


class _Runner:
    """One scheme's network and optimizer during one seed."""

    def __init__(self, result: SchemeResult, base: nn.Sequential, settings: Settings) -> None:
        self.result = result
        self.model = copy.deepcopy(base)
        optimizer = OPTIMIZERS[settings.optimizer]
        self.optimizer = optimizer(self.model.parameters(), lr=settings.lr)
        if result.scheme.config is not None:
            # With ten outputs, scoring the rows costs more than the gradient itself.
            convert_(self.model, result.scheme.config, overrides={HEAD: None})
            attach_optimizer(self.model, self.optimizer)
        result.losses.append([])
        result.accuracies.append([])
        self._losses: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self._losses.append(loss.item())
        self.result.step_seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def evaluate(self, data: Images) -> float:
        parts = zip(data.x_test.split(1000), data.y_test.split(1000), strict=True)
        correct = sum(int((self.model(x).argmax(1) == y).sum()) for x, y in parts)
        accuracy = correct / len(data.y_test)
        self.result.losses[-1].append(statistics.fmean(self._losses))
        self.result.accuracies[-1].append(accuracy)
        self._losses.clear()
        return accuracy

    def measure_cost(self, rows: int) -> None:
        """Set the share of dW's FLOPs in batches of `rows` rows, and the bytes of the memories."""
        layers = [layer for layer in self.model if isinstance(layer, MemAOPLinear)]
        if layers:
            flops = sum(_flops(layer, rows) for layer in layers)
            dense = sum(2 * rows * layer.in_features * layer.out_features for layer in layers)
            self.result.gradient_flops = flops / dense
        self.result.memory_bytes = sum(layer.memory.nbytes for layer in layers if layer.memory)


def _flops(layer: MemAOPLinear, rows: int) -> int:
    n, p = layer.in_features, layer.out_features
    subspace = layer.memory.cost if isinstance(layer.memory, SubspaceMemory) else None
    k = layer.config.num_rows(rows, n, p, subspace)
    return weight_grad_flops(rows, n, p, k, subspace)


def _batches(rows: int, batch: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` batches of row numbers, cut from one shuffled pass after another."""
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(left) < batch:
            left = torch.cat([left, torch.randperm(rows, generator=generator)])
        yield left[:batch]
        left = left[batch:]


def _train(runners: list[_Runner], batch: int, data: Images, seed: int, progress: Progress) -> None:
    generator = torch.Generator().manual_seed(seed)
    evaluations = runners[0].result.steps
    steps = evaluations[-1]
    batches = _batches(len(data.x_train), batch, steps, generator)
    for number, rows in enumerate(batches, start=1):
        x, y = data.x_train[rows], data.y_train[rows]
        for index in torch.randperm(len(runners), generator=generator).tolist():
            runners[index].step(x, y)
        if number in evaluations:
            for runner in runners:
                progress(runner.result.scheme.key, seed * steps + number, runner.evaluate(data))


def _gradient_calls(model: nn.Sequential, x: Tensor, y: Tensor) -> list[Callable[[], Tensor]]:
    """For every hidden layer a call that computes its weight gradient the way the scheme does."""
    model.eval()  # the backward pass is exact and does not change the memories
    passed = []
    for layer in model:
        rows, x = x, layer(x)
        if isinstance(layer, nn.Linear):
            x.retain_grad()
            passed.append((layer, rows.detach(), x))
    nn.functional.cross_entropy(x, y).backward()
    calls: list[Callable[[], Tensor]] = []
    for layer, rows, output in passed[:-1]:
        assert output.grad is not None
        if isinstance(layer, MemAOPLinear):
            call = functools.partial(weight_grad, rows, output.grad, layer.config, layer.memory)
        else:
            call = functools.partial(torch.mm, output.grad.t(), rows)
        calls.append(call)
    return calls


def _time_gradients(runners: list[_Runner], data: Images, batch: int) -> None:
    """Time the weight gradients of the trained networks on one batch, the schemes in turn."""
    x, y = data.x_train[:batch], data.y_train[:batch]
    calls = [_gradient_calls(runner.model, x, y) for runner in runners]
    generator = torch.Generator().manual_seed(0)
    for number in range(_GRADIENT_ROUNDS + 1):
        for index in torch.randperm(len(runners), generator=generator).tolist():
            start = time.perf_counter()
            with torch.no_grad():
                for call in calls[index]:
                    call()
            if number > 0:  # the first round warms up
                runners[index].result.gradient_seconds.append(time.perf_counter() - start)
