"""Products of matrices in one training step, counted while it runs."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from memaop_triton import MemAOPConfig
from memaop_triton.bench.studies.quality.batches import Batch
from memaop_triton.bench.studies.quality.tasks import Task
from memaop_triton.bench.studies.quality.training import Trainer, loss_of


class Flops(NamedTuple):
    """FLOPs of one step.

    Attributes:
        weight_grads: Of the weight gradients of all linear layers, those left dense included, as a
            fraction of what they take in the dense network.
        backward: Of the backward pass, in 10⁹.
    """

    weight_grads: float
    backward: float


#: Of steps that are not alike.
UNKNOWN = Flops(math.nan, math.nan)


def count(task: Task, config: MemAOPConfig | None, batch: Batch) -> Flops:
    """Count one step on `batch`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        linear, dense = _passes(task, None, batch)
        if config is None:
            return Flops(1.0, 1e-9 * dense)
        _, backward = _passes(task, config, batch)
        # What is done to the input gradient does not change what the weight gradients take.
        exact = dataclasses.replace(config, grad_input="exact")
        _, with_exact_dx = _passes(task, exact, batch)
    return Flops(1 - (dense - with_exact_dx) / linear, 1e-9 * backward)


def _passes(task: Task, config: MemAOPConfig | None, batch: Batch) -> tuple[int, int]:
    """FLOPs of the linear layers' forward pass, as many as of dense dW, and of the backward."""
    model = Trainer(task, config, seed=0).model
    # The counter does not count the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = loss_of(model, batch)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    counts = forward.get_flop_counts()["Global"]
    linear = sum(counts.get(op, 0) for op in (torch.ops.aten.addmm, torch.ops.aten.mm))
    return linear, backward.get_total_flops()
