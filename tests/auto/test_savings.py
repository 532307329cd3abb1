"""Times of the options of a layer."""

import random

import torch

from memaop_triton import MemAOPConfig
from memaop_triton.auto import savings
from memaop_triton.auto.layer_timing import Measurement, Use

CPU = torch.device("cpu")
CONFIGS = {
    share: MemAOPConfig(ratio="auto", memory="none").spending(ratio=share)
    for share in (1.0, 1 / 2, 1 / 4)
}


def use(rows):
    return Use(rows, 8, 8, torch.float32, CPU, needs_input=False)


def test_passes_add_up_and_a_shape_is_timed_once(monkeypatch):
    asked = []

    def measure_each(use, configs, budget, shortest, exact):
        asked.append((use.rows, [config.ratio for config in configs]))
        return [Measurement([8.0, 9.0, 90.0], [16.0 * c.ratio] * 3, 0) for c in configs]

    monkeypatch.setattr(savings, "measure_each", measure_each)
    times = savings.Savings()
    assert times.seconds([use(9)], CONFIGS) == {1.0: 9.0, 1 / 2: 8.0, 1 / 4: 4.0}
    assert times.seconds([use(9), use(7), use(7)], CONFIGS) == {1.0: 27.0, 1 / 2: 24.0, 1 / 4: 12.0}
    assert asked == [(9, [1 / 2, 1 / 4]), (7, [1 / 2, 1 / 4])]


def test_what_is_timed_draws_nothing_from_the_training():
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.rand(3), random.random()
    torch.manual_seed(3)
    random.seed(3)
    times = savings.Savings().seconds([use(64)], CONFIGS)
    assert all(seconds > 0 for seconds in times.values())
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
