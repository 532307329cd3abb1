"""The experiments of the paper (arXiv 2110.09164, figures 3 and 4) under its authors' protocol.

Every run is a one-layer network trained by SGD on shuffled batches, with the paper's schemes as
configurations of this package's layers. Each (scheme, run) pair has a seed of its own, so that the
schemes' means have independent errors.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import multiprocessing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from memaop_triton import MemAOPConfig, attach_optimizer, convert_
from memaop_triton.experiments.data import CLASSES, load_energy, load_images

LEARNING_RATE = 0.01
SELECTIONS = ("topk", "weightedk", "randk")
MEMORIES = ("residual", "none")


class Scheme(NamedTuple):
    """How dW is computed: from `k` rows, or from all of them (`k` is `None`, the dense layer)."""

    selection: str
    memory: str
    k: int | None

    @property
    def label(self) -> str:
        """Name for tables and legends, without `k`."""
        if self.k is None:
            return "dense"
        return self.selection + (" + residual" if self.memory == "residual" else "")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The paper's set-up for one data set.

    Attributes:
        name: `"energy"` or `"mnist"`.
        batch_size: M. A last batch that is shorter is skipped.
        ks: The numbers of rows K.
        epochs: The paper's number of epochs.
        runs: Default number of runs of every scheme.
    """

    name: str
    batch_size: int
    ks: tuple[int, ...]
    epochs: int
    runs: int

    def schemes(self) -> list[Scheme]:
        """Dense, and every selection with and without memory at every K."""
        return [Scheme("dense", "none", None)] + [
            Scheme(selection, memory, k)
            for k in self.ks
            for memory in MEMORIES
            for selection in SELECTIONS
        ]


EXPERIMENTS = {
    "energy": Experiment("energy", batch_size=144, ks=(18, 9, 3), epochs=100, runs=10),
    "mnist": Experiment("mnist", batch_size=64, ks=(32, 16, 8), epochs=30, runs=3),
}


class Problem(NamedTuple):
    """Data of one experiment.

    Attributes:
        x_train: [samples, features] float32.
        y_train: [samples, 1] float32 for energy, [samples] int64 for MNIST.
        x_val: [validation samples, features].
        y_val: Like `y_train`.
        accuracy_over: What correct answers are divided by for the accuracy; `None` for regression.
    """

    x_train: Tensor
    y_train: Tensor
    x_val: Tensor
    y_val: Tensor
    accuracy_over: int | None


class Task(NamedTuple):
    """One run of one scheme."""

    experiment: Experiment
    scheme: Scheme
    epochs: int
    seed: int
    data_dir: Path | None


class Outcome(NamedTuple):
    """Validation loss, and accuracy in [0, 1] where there is one, after every epoch of a run."""

    scheme: Scheme
    losses: list[float]
    accuracies: list[float]


def prepare_energy(table: npt.NDArray[np.float64]) -> Problem:
    """Split and encode the energy data ([768, 10], as `load_energy` returns it).

    The first 75 % of the rows train, unshuffled. Columns 1 to 5 and 7 are standardised with the
    training rows' mean and population standard deviation; columns 6 (orientation, 4 values) and 8
    (glazing distribution, 6 values) are one-hot. The target is the heating load, column 9.

    Returns:
        Inputs of 16 features: the 6 standardised ones, then 4 + 6 indicators.
    """
    train = len(table) * 3 // 4
    numbers = table[:, [0, 1, 2, 3, 4, 6]]
    scaled = (numbers - numbers[:train].mean(0)) / numbers[:train].std(0)
    indicators = [table[:, [c]] == np.unique(table[:, c]) for c in (5, 7)]
    x = torch.from_numpy(np.hstack([scaled, *indicators]).astype(np.float32))
    y = torch.from_numpy(table[:, [8]].astype(np.float32))
    return Problem(x[:train], y[:train], x[train:], y[train:], None)


def prepare_mnist(data_dir: Path | None) -> Problem:
    """MNIST with pixels in [−1, 1]; validation leaves out the last batch of 64, which is short."""
    images = load_images("mnist", data_dir)
    batch = EXPERIMENTS["mnist"].batch_size
    rows = len(images.x_test) // batch * batch
    return Problem(
        images.x_train.sub_(0.5).div_(0.5),
        images.y_train,
        images.x_test[:rows].sub_(0.5).div_(0.5),
        images.y_test[:rows],
        len(images.y_test),
    )


@functools.cache
def load_problem(name: str, data_dir: Path | None) -> Problem:
    """Data of the experiment `name`, read once per process.

    Raises:
        DataError: The data is missing.
        CommandError: scikit-learn is needed to fetch it and not installed.
    """
    return prepare_mnist(data_dir) if name == "mnist" else prepare_energy(load_energy(data_dir))


def make_tasks(
    experiment: Experiment, runs: int, epochs: int, seed: int, data_dir: Path | None
) -> list[Task]:
    """`runs` runs of every scheme, each with an independent seed derived from `seed`."""

    def seed_of(number: int, run: int) -> int:
        return int(np.random.SeedSequence(seed, spawn_key=(number, run)).generate_state(1)[0])

    return [
        Task(experiment, scheme, epochs, seed_of(number, run), data_dir)
        for run in range(runs)
        for number, scheme in enumerate(experiment.schemes())
    ]


def run_tasks(tasks: Iterable[Task], jobs: int) -> Iterator[Outcome]:
    """Run the tasks in `jobs` processes of one thread each; the outcomes are in their order.

    With one job everything runs in this process.
    """
    if jobs == 1:
        yield from map(run_task, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        yield from pool.map(run_task, tasks)


def run_task(task: Task) -> Outcome:
    """Train one network from its seed, on one thread, leaving the global generator as it was."""
    problem = load_problem(task.experiment.name, task.data_dir)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(task.seed)
            return _train(task, problem)
    finally:
        torch.set_num_threads(threads)


def build_model(problem: Problem) -> tuple[nn.Sequential, nn.Module]:
    """The network and its loss: one linear layer, followed by a softmax for MNIST.

    The cross-entropy takes a softmax of its own, so it cannot fall below 1.461 for ten
    classes. That is the authors' protocol.
    """
    features = problem.x_train.shape[1]
    if problem.accuracy_over is None:
        return nn.Sequential(nn.Linear(features, 1)), nn.MSELoss()
    return nn.Sequential(nn.Linear(features, CLASSES), nn.Softmax(1)), nn.CrossEntropyLoss()


def _train(task: Task, problem: Problem) -> Outcome:
    model, criterion = build_model(problem)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    if task.scheme.k is not None:
        selection, memory, k = task.scheme
        convert_(model, MemAOPConfig.paper(k=k, selection=selection, memory=memory))
        attach_optimizer(model, optimizer)
    outcome = Outcome(task.scheme, [], [])
    batch = task.experiment.batch_size
    for _ in range(task.epochs):
        for rows in torch.randperm(len(problem.x_train)).split(batch):
            if len(rows) < batch:
                continue
            optimizer.zero_grad()
            criterion(model(problem.x_train[rows]), problem.y_train[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            output = model(problem.x_val)
            outcome.losses.append(criterion(output, problem.y_val).item())
        if problem.accuracy_over is not None:
            correct = int((output.argmax(1) == problem.y_val).sum())
            outcome.accuracies.append(correct / problem.accuracy_over)
    return outcome
