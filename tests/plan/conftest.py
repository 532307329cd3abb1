import pytest
import torch

from memaop_triton.auto.layer_timing import Measurement
from memaop_triton.plan import deciding, observing, planning


@pytest.fixture
def measured(monkeypatch):
    """Replaces measuring: `times` by (rows, N, P), and the cases that were `asked` for.

    Where none are given, ours takes a quarter of the dense time.
    """
    times, asked = {}, []

    def measure(use, config, budget):
        torch.rand(1)  # as measuring does
        asked.append((use, config, budget))
        dense, ours = times.get(use[:3], ([4.0] * 3, [1.0] * 3))
        return Measurement(dense, ours, 100 * use.rows)

    monkeypatch.setattr(planning, "measure", measure)
    measure.times, measure.asked = times, asked
    return measure


@pytest.fixture
def savings(monkeypatch):
    """Replaces the times of weight gradients with `ratio="auto"`: seconds of a pass, by K/M.

    A training step takes ten.
    """
    times = {1.0: 4.0, 1 / 2: 2.2, 1 / 4: 1.2, 1 / 8: 0.8, 1 / 16: 0.6}

    class Savings:
        def seconds(self, uses, configs):
            assert [config.ratio for config in configs.values()] == list(configs) == list(times)
            return {share: len(list(uses)) * seconds for share, seconds in times.items()}

    monkeypatch.setattr(deciding, "Savings", Savings)

    def elapsed(step, device):
        step()
        return 10.0

    monkeypatch.setattr(observing, "elapsed", elapsed)
    return times
