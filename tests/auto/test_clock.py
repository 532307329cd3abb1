"""Seconds between two steps."""

import itertools
import math
import time

import pytest
import torch

from memaop_triton.auto import clock
from memaop_triton.auto.clock import StepClock


def test_intervals_by_kind():
    steps = StepClock(torch.device("cpu"))
    steps.tick("exact")  # nothing was before it
    for kind in ("exact", None, "sampled"):
        time.sleep(0.01)
        steps.tick(kind)
    assert [len(steps.seconds(kind)) for kind in ("exact", "sampled", "other")] == [1, 1, 0]
    assert 0.01 <= steps.mean("exact") < 10
    steps.forget("exact")
    assert steps.seconds("exact") == []


def test_only_the_newest_are_kept(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(next(now) ** 2))
    steps = StepClock(torch.device("cpu"))
    for _ in range(50):
        steps.tick("exact")
    assert steps.seconds("exact") == [2.0 * i + 1 for i in range(17, 49)]


def test_a_refresh_counts_and_a_break_hardly(monkeypatch):
    ends = itertools.accumulate([0, 4, 4, 4, 4, 4, 4, 4, 6, 4, 4, 4, 4, 4, 4, 4, 600])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(next(ends)))
    steps = StepClock(torch.device("cpu"))
    for _ in range(17):
        steps.tick("sampled")
    assert steps.mean("sampled") == (14 * 4 + 6 + 8) / 16
    assert steps.median("sampled") == 4
    assert math.isnan(steps.mean("exact"))
    assert math.isnan(steps.median("exact"))


class Event:
    """An event of a GPU that passes when it is told to."""

    passed = 0
    made = None  # a list

    def __init__(self, enable_timing):
        assert enable_timing
        self.number = len(Event.made)
        Event.made.append(self)

    def record(self, stream):
        assert stream == "stream"

    def query(self):
        return self.number < Event.passed

    def elapsed_time(self, end):
        assert end.query(), "not there yet"
        return 1000.0 * (end.number - self.number)


def test_on_a_gpu_intervals_are_read_once_they_have_passed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(Event, "made", [])
    monkeypatch.setattr(Event, "passed", 0)
    steps = StepClock(torch.device("cuda", 0))
    for _ in range(5):
        steps.tick("exact")
    assert steps.seconds("exact") == []
    Event.passed = 3
    assert steps.seconds("exact") == [pytest.approx(1.0)] * 2
    Event.passed = 5
    assert len(steps.seconds("exact")) == 4
