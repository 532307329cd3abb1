"""What a training step holds, dense, with a stash, and by other methods."""

import dataclasses
import functools

import pytest
import torch

from memaop_triton.bench import measure
from memaop_triton.bench.suites import memory
from memaop_triton.bench.suites.problem import Problem

DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
TRAININGS = [
    memory.blocks("GPT", 512, 4, 256, 4, causal=True),
    memory.blocks("ViT", 384, 4, 197, 8, causal=False),
    memory.minilm(32, 128),
    memory.lora(512, 4, 256, 4),
]
TINY = [memory.blocks("GPT", 64, 2, 32, 4, causal=True), memory.lora(64, 2, 32, 4, rank=4)]


def cases(suite, trainings, device, dtype):
    return [
        pytest.param(one, device, dtype, marks=pytest.mark.suite(suite), id=f"{suite}-{number}")
        for number, one in enumerate(trainings)
    ]


@pytest.mark.parametrize(
    ("training", "device", "dtype"),
    [*cases("memory", TRAININGS, DEVICE, DTYPE), *cases("smoke", TINY, "cpu", torch.float32)],
)
def test_memory(compare, benchmark, training, device, dtype):
    problem = Problem(training.rows, training.width, training.width, memory.RATIO, dtype, device)
    steps = memory.steps(training, device, dtype)
    whole, few = training.samples, training.samples // 4
    # Times of two batches, in the same rounds: a part of them does not grow with the batch.
    timed = memory.methods(steps, whole)
    smaller = {one.name: f"{few} of {whole}, {one.name}" for one in timed}
    for one in memory.methods(steps, few):
        timed.append(dataclasses.replace(one, name=smaller[one.name], role="baseline"))
    compare(problem, "memory", training.name, timed, model=training.name)
    clock = measure.clock_for(torch.device(device))
    found = benchmark.extra_info["methods"]
    for name, step in steps.items():
        peak, small_peak = step.batch_peaks(clock, whole, few)
        found[name] |= {
            "saved_bytes": clock.held_bytes(functools.partial(step.forward, whole)),
            "resident_bytes": step.resident_bytes,
            "batch_bytes": peak,
            "small_batch_bytes": small_peak,
            "small_ms": found.pop(smaller[name])["ms"],
        }
    benchmark.extra_info.update(samples=whole, small_samples=few)
