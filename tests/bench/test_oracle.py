"""The oracle of the first run refuses what is wrong."""

from dataclasses import replace

import pytest
import torch

from memaop_triton.bench.first_run import oracle


def taken(config, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    memory = oracle.new_memory(config, 16, 24)
    for _ in range(2):
        x, g = (oracle.rows_of(48, c, dtype, generator) for c in (16, 24))
        step = oracle.take_step(config, memory, x, g, generator)
    oracle.check_step(step)
    return step


SETTINGS = [
    {},
    {"memory": "none"},
    {"selection": "topk", "memory": "none"},
    {"selection": "topk", "memory": "residual"},
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_oracle_refuses_wrong_values(setting):
    step = taken(oracle.MemAOPConfig(ratio=1 / 4, **setting))
    wrong = [replace(step, weight=step.weight * (1 + 1e-4)), replace(step, bias=step.bias + 0.01)]
    rows, weights = step.watch.selection
    for selection in ((rows.flip(0), weights), (rows[1:], weights[1:])):
        watch = replace(step.watch, selection=type(step.watch.selection)(*selection))
        wrong.append(replace(step, watch=watch))
    for one in wrong:
        with pytest.raises(oracle.WrongResultError):
            oracle.check_step(one)


def test_the_oracle_refuses_weights_that_do_not_follow_from_scores():
    step = taken(oracle.MemAOPConfig(ratio=1 / 4, memory="none"))
    rows, weights = step.watch.selection
    wrong = weights.clone()
    wrong[weights.argmax()] *= 1.1
    watch = replace(step.watch, selection=type(step.watch.selection)(rows, wrong))
    with pytest.raises(oracle.WrongResultError, match="in proportion to 1/score"):
        oracle.check_step(replace(step, watch=watch))


def test_the_oracle_refuses_a_memory_that_lost_a_row():
    step = taken(oracle.MemAOPConfig(ratio=1 / 4, selection="topk", memory="residual"))
    kept = step.memory.filled.nonzero()[0, 0]
    step.memory.x[kept, 3] += 0.5
    with pytest.raises(oracle.WrongResultError, match="more than one rounding"):
        oracle.check_step(step)
    step.memory.filled[kept] = False
    with pytest.raises(oracle.WrongResultError, match="other slots"):
        oracle.check_step(step)
