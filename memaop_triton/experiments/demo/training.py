"""Train one network under several schemes, and take the time of every step.

With one seed all schemes start from the same weights and get the same batches. They train in turn,
a block of steps each, in a new random order for every block, so that other work on the machine
slows them all alike.

`ratio="auto"` takes the time from the end of one step to the end of the next, for which the step
must follow at once. In a block only the first does not: its interval holds the other schemes'
blocks and the evaluation. A block has at least `BLOCK` steps, so that at most one interval in eight
is longer than its step. Of the 14 to 16 of either kind that a trial compares these are two or
three, and none counts for more than two others.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memaop_triton import MemAOPConfig, attach_optimizer, auto_freeze, convert_, model_report
from memaop_triton.errors import CommandError
from memaop_triton.experiments.data import Examples
from memaop_triton.experiments.demo.gradients import Cost, costs_of

BLOCK = 8  # steps that follow each other, at least
HEAD = "head"  # the output layer of every network


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One way to compute the weight gradients; `config` is `None` for the dense network."""

    key: str
    label: str
    config: MemAOPConfig | None


@dataclasses.dataclass(frozen=True)
class Training:
    """What is trained, for how long, and under which schemes.

    Attributes:
        name: For the names of files.
        title: What it is, for the table.
        network: The layers and what is compared, for the figure.
        settings: For the JSON file.
        schemes: The first one is dense.
        data: What is learned; rows of `x_train` make up the batches.
        batch_size: Rows of a batch.
        steps: Of one training.
        seeds: Trainings of every scheme.
        evaluations: At most, and at least `BLOCK` steps apart.
        build: Makes the network, with a layer `head`, from torch's default generator.
        optimizer: Makes the optimizer of these Parameters.
        is_decaying: Whether the learning rate falls linearly to zero, or is constant.
    """

    name: str
    title: str
    network: str
    settings: dict[str, Any]
    schemes: Sequence[Scheme]
    data: Examples
    batch_size: int
    steps: int
    seeds: int
    evaluations: int
    build: Callable[[], nn.Module]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    is_decaying: bool

    def ends(self) -> list[int]:
        """Steps at the ends of the blocks; networks are evaluated there, and before the first."""
        blocks = max(1, min(self.evaluations, self.steps // BLOCK))
        return [round(self.steps * number / blocks) for number in range(1, blocks + 1)]


@dataclasses.dataclass
class Result:
    """The results of one scheme over all seeds.

    Attributes:
        scheme: The scheme.
        steps: Steps taken before each evaluation.
        losses: [seeds, evaluations], the mean test loss in nats.
        accuracies: [seeds, evaluations], the test accuracy in [0, 1].
        step_seconds: [seeds, steps], every training step's time.
        decisions: What "auto" had decided at the end, a line for every seed.
        cost: Of the weight gradients of one step, at the end of the last training.
    """

    scheme: Scheme
    steps: list[int]
    losses: list[list[float]] = dataclasses.field(default_factory=list)
    accuracies: list[list[float]] = dataclasses.field(default_factory=list)
    step_seconds: list[list[float]] = dataclasses.field(default_factory=list)
    decisions: list[str] = dataclasses.field(default_factory=list)
    cost: Cost = dataclasses.field(default_factory=Cost)

    @property
    def step_median(self) -> float:
        """Median time of a training step, in seconds."""
        return statistics.median(itertools.chain.from_iterable(self.step_seconds))

    def seconds_at_evaluations(self) -> list[float]:
        """Seconds of all steps before each evaluation, the mean over seeds."""
        curves = [[0.0, *itertools.accumulate(steps)] for steps in self.step_seconds]
        return [statistics.fmean(curve[step] for curve in curves) for step in self.steps]

    @property
    def seconds(self) -> float:
        """Of a whole training, the mean over seeds."""
        return self.seconds_at_evaluations()[-1]


#: Called after every evaluation with (scheme key, steps taken over all seeds, test accuracy).
Progress = Callable[[str, int, float], None]


def check_batch(batch_size: int, rows: int, what: str) -> None:
    """Raise `CommandError` if a batch is larger than the training set of `rows` `what`."""
    if batch_size > rows:
        raise CommandError(
            f"--batch-size={batch_size} exceeds the {rows} training {what}: take fewer."
        )


def run(training: Training, progress: Progress = lambda *_: None) -> list[Result]:
    """Train every scheme with every seed; the results are in the order of the schemes."""
    evaluations = [0, *training.ends()]
    results = [Result(scheme, evaluations) for scheme in training.schemes]
    for seed in range(training.seeds):
        torch.manual_seed(seed)
        base = training.build()
        runners = [_Runner(result, base, training) for result in results]
        _train(runners, training, seed, progress)
        for runner in runners:
            runner.keep_decision()
    rows = slice(training.batch_size)
    costs = costs_of(
        [runner.model for runner in runners],
        training.data.x_train[rows],
        training.data.y_train[rows],
    )
    for result, cost in zip(results, costs, strict=True):
        result.cost = cost
    return results


class _Runner:
    """One scheme's network and optimizer during one seed."""

    def __init__(self, result: Result, base: nn.Module, training: Training) -> None:
        self.result = result
        self.model = copy.deepcopy(base)
        self.optimizer = training.optimizer(self.model.parameters())
        if result.scheme.config is not None:
            # With few outputs, scoring the rows costs more than the gradient itself.
            convert_(self.model, result.scheme.config, overrides={HEAD: None})
            attach_optimizer(self.model, self.optimizer)
        last = training.steps if training.is_decaying else math.inf
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 1 - step / last
        )
        result.losses.append([])
        result.accuracies.append([])
        result.step_seconds.append([])

    def step(self, x: Tensor, y: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self._schedule.step()
        self.result.step_seconds[-1].append(time.perf_counter() - start)

    @torch.no_grad()
    def evaluate(self, data: Examples) -> float:
        loss, correct = 0.0, 0
        for x, y in zip(data.x_test.split(256), data.y_test.split(256), strict=True):
            logits = self.model(x)
            loss += nn.functional.cross_entropy(logits, y, reduction="sum").item()
            correct += int((logits.argmax(1) == y).sum())
        self.result.losses[-1].append(loss / len(data.y_test))
        self.result.accuracies[-1].append(correct / len(data.y_test))
        return self.result.accuracies[-1][-1]

    def keep_decision(self) -> None:
        """Note what "auto" decided, and let the layers stay so."""
        config = self.result.scheme.config
        if config is not None and config.ratio == "auto":
            self.result.decisions.append(model_report(self.model).splitlines()[0])
            auto_freeze(self.model)


def _batches(rows: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of row numbers without end, cut from one shuffled pass after another."""
    left = torch.empty(0, dtype=torch.int64)
    while True:
        if len(left) < batch:
            left = torch.cat([left, torch.randperm(rows, generator=generator)])
        yield left[:batch]
        left = left[batch:]


def _train(runners: list[_Runner], training: Training, seed: int, progress: Progress) -> None:
    data = training.data
    generator = torch.Generator().manual_seed(seed)
    batches = _batches(len(data.x_train), training.batch_size, generator)
    for runner in runners:
        runner.evaluate(data)
    for start, end in itertools.pairwise([0, *training.ends()]):
        block = [
            (data.x_train[rows], data.y_train[rows])
            for rows in itertools.islice(batches, end - start)
        ]
        for index in torch.randperm(len(runners), generator=generator).tolist():
            for x, y in block:
                runners[index].step(x, y)
        for runner in runners:
            done = seed * training.steps + end
            progress(runner.result.scheme.key, done, runner.evaluate(data))
