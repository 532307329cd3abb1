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
    whole, half = training.samples, training.samples // 2
    # Peak and time of two batches, in the same rounds: a part of both does not grow with the batch.
    timed = memory.methods(steps, whole)
    halves = {one.name: f"half: {one.name}" for one in timed}
    for one in memory.methods(steps, half):
        timed.append(dataclasses.replace(one, name=halves[one.name], role="baseline"))
    compare(problem, "memory", training.name, timed, model=training.name)
    clock = measure.clock_for(torch.device(device))
    found = benchmark.extra_info["methods"]
    for name, step in steps.items():
        small = found.pop(halves[name])
        found[name] |= {
            "saved_bytes": clock.held_bytes(functools.partial(step.forward, whole)),
            "resident_bytes": step.resident_bytes,
            "half_ms": small["ms"],
            "half_peak_bytes": small["peak_bytes"],
        }
    benchmark.extra_info["samples"] = whole
