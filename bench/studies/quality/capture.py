"""Rows of the linear layers of a network that has been trained for a while."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memaop_triton.bench.studies.quality.batches import Batch, Data
from memaop_triton.bench.studies.quality.tasks import Task
from memaop_triton.bench.studies.quality.training import Trainer, evaluating, loss_of


class Rows(NamedTuple):
    """Inputs and output gradients of one layer in one batch: [M, N] and [M, P]."""

    x: Tensor
    g: Tensor


def capture(
    task: Task, source: Data, steps: int, batches: int, most_rows: int | None = None
) -> dict[str, list[Rows]]:
    """Rows of every hidden linear layer over `batches` batches, after `steps` steps of training.

    The network is dense, from seed 0, and its weights stay as they are meanwhile. A batch is the
    task's, or as many of its images or sequences as make `most_rows` rows.
    """
    trainer = Trainer(task, None, seed=0)
    generator = torch.Generator().manual_seed(0)
    for batch in source.batches(task.batch, steps, generator):
        trainer.step(batch)
    size = task.batch
    if most_rows is not None:
        size = max(1, min(size, most_rows // source.sample.y[0].numel()))
    with evaluating(trainer.model):
        return rows_of(trainer.model, task, source.batches(size, batches, generator))


def rows_of(model: nn.Module, task: Task, batches: Iterable[Batch]) -> dict[str, list[Rows]]:
    """Rows of every layer that schemes convert, batch by batch; gradients add up in the model."""
    layers = hidden_layers(model, task)
    found: dict[str, list[Rows]] = {name: [] for name in layers}
    handles = [_watch(module, found[name]) for name, module in layers.items()]
    for batch in batches:
        loss_of(model, batch).backward()
    for handle in handles:
        handle.remove()
    return found


def hidden_layers(model: nn.Module, task: Task) -> dict[str, nn.Linear]:
    """The linear layers of a dense network that schemes convert."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in task.left_dense
    }


def _watch(module: nn.Linear, rows: list[Rows]) -> torch.utils.hooks.RemovableHandle:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2)
        output.register_hook(lambda g: rows.append(Rows(x, g.flatten(0, -2).clone())))

    return module.register_forward_hook(hook)
