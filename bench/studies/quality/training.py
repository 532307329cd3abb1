"""One run: a task under a scheme from a seed.

Runs of the same task and seed start from the same weights and see the same batches, whatever the
scheme: what is drawn for these comes from generators of their own, and the global one only serves
the scheme.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memaop_triton import MemAOPConfig, allocate_, attach_optimizer, convert_, monitor
from memaop_triton.bench.studies.quality.batches import MASKED, Batch, Data
from memaop_triton.bench.studies.quality.rotation import Rotation
from memaop_triton.bench.studies.quality.tasks import Task
from memaop_triton.monitor.allocate import DEFAULT_BUDGETS

POINTS = 10  # of a curve
ALLOCATE_EVERY = 50  # steps
ALLOCATED_SHARES = (*DEFAULT_BUDGETS, 1.0)  # of budgets and ratios alike
_NUMBERS = 1 << 16  # pixels or characters of one forward pass of an evaluation


class Score(NamedTuple):
    """Mean cross-entropy in nats, and accuracy in %."""

    loss: float
    accuracy: float


class Point(NamedTuple):
    """A point of a curve: loss and accuracy on the sample of held-out data after `step` steps."""

    step: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes:
        score: On all held-out data, after the last step. Not finite if the run diverged.
        curve: As it went.
        diverged_at: The step whose loss was not finite, which ended the run; 0 if there is none.
        seconds: Of the whole run with evaluations, on a machine that may have done other things.
        step_seconds: Of every step by itself, on the same machine.
    """

    score: Score
    curve: tuple[Point, ...]
    diverged_at: int
    seconds: float
    step_seconds: tuple[float, ...] = ()


class Seeds(NamedTuple):
    """Independent seeds of one run: of the weights, of the batches, of the scheme's draws."""

    weights: int
    batches: int
    draws: int

    @classmethod
    def of(cls, seed: int) -> Seeds:
        """The seeds that `seed` stands for."""
        weights, batches, draws = np.random.SeedSequence(seed).generate_state(3).tolist()
        return cls(weights, batches, draws)


class Trainer:
    """A network, its optimizer and the steps they take.

    Args:
        task: What is trained.
        config: What its layers are converted with; `None` leaves them dense.
        seed: Of the weights. The global generator is left as it was.
        allocated: Share of the dense layers' FLOPs that `allocate_` spreads over them from time to
            time; `None` leaves all with the rows that `config` gives them.
        rotating: Share of the layers that get their exact gradient in a step, the others none;
            `None` for all.

    Attributes:
        seconds: Of every step that was taken.
    """

    def __init__(
        self,
        task: Task,
        config: MemAOPConfig | None,
        seed: int,
        *,
        allocated: float | None = None,
        rotating: float | None = None,
    ) -> None:
        self.task = task
        self.seed = seed
        self.allocated = allocated
        self.seconds: list[float] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(Seeds.of(seed).weights)
            self.model = task.network.build()
        self.optimizer = task.optimizer.build(self.model)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: task.optimizer.factor(step, task.steps)
        )
        if config is not None:
            convert_(self.model, config, overrides=dict.fromkeys(task.left_dense))
            attach_optimizer(self.model, self.optimizer)
        self.monitor = (
            None if allocated is None else monitor(self.model, every=5, starving=math.inf)
        )
        self.rotation = None if rotating is None else Rotation(self._layers(), rotating)

    def _layers(self) -> list[nn.Module]:
        """The linear layers that schemes apply to."""
        return [
            layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, nn.Linear) and name not in self.task.left_dense
        ]

    def step(self, batch: Batch) -> float:
        """Take one step, unless the loss is not finite; the loss before it."""
        start = time.perf_counter()
        value = self._step(batch)
        self.seconds.append(time.perf_counter() - start)
        return value

    def _step(self, batch: Batch) -> float:
        if self.rotation is not None:
            self.rotation.turn()
        self.optimizer.zero_grad()
        loss = loss_of(self.model, batch)
        value = loss.item()
        if math.isfinite(value):
            loss.backward()
            if self.task.optimizer.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.task.optimizer.clip)
            self.optimizer.step()
            self.schedule.step()
            steps = self.schedule.last_epoch
            if self.monitor and self.allocated and steps % ALLOCATE_EVERY == 0:
                allocate_(self.model, self.monitor, self.allocated, ALLOCATED_SHARES)
        return value


def train(
    trainer: Trainer, data: Data, progress: Callable[[int], None] = lambda step: None
) -> Outcome:
    """Take all steps of a new trainer; `progress` is called with the number of every step taken."""
    start = time.perf_counter()
    task, seeds = trainer.task, Seeds.of(trainer.seed)
    points = curve_points(task)
    curve: list[Point] = []
    sample = data.sample
    generator = torch.Generator().manual_seed(seeds.batches)
    diverged_at = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.draws)
        for number, batch in enumerate(data.batches(task.batch, task.steps, generator), start=1):
            if not math.isfinite(trainer.step(batch)):
                diverged_at = number
                break
            if number in points:
                curve.append(Point(number, *evaluate(trainer.model, sample)))
            progress(number)
    score = Score(math.nan, math.nan)
    if not diverged_at:
        score = evaluate(trainer.model, data.held_out)
        if not math.isfinite(score.loss):
            diverged_at = task.steps
    seconds = time.perf_counter() - start
    return Outcome(score, tuple(curve), diverged_at, seconds, tuple(trainer.seconds))


def curve_points(task: Task) -> list[int]:
    """The steps after which a curve has a point."""
    return sorted({round(i * task.steps / POINTS) for i in range(1, POINTS + 1)})


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of a batch over the targets that are not `MASKED`, in nats."""
    return F.cross_entropy(model(batch.x).flatten(0, -2), batch.y.flatten(), ignore_index=MASKED)


@torch.no_grad()
def evaluate(model: nn.Module, batch: Batch) -> Score:
    """Loss and accuracy on any number of images or sequences."""
    loss = correct = 0.0
    rows = max(1, _NUMBERS // batch.x[0].numel())
    with evaluating(model):
        for x, y in zip(batch.x.split(rows), batch.y.split(rows), strict=True):
            logits = model(x).flatten(0, -2)
            targets = y.flatten()
            loss += F.cross_entropy(logits, targets, reduction="sum", ignore_index=MASKED).item()
            correct += (logits.argmax(1) == targets).sum().item()
    count = (batch.y != MASKED).sum().item()
    return Score(loss / count, 100 * correct / count)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode: gradients are exact, memories are not used."""
    model.eval()
    try:
        yield
    finally:
        model.train()
