"""Which steps are observed: late enough, and seldom enough, for what that costs."""

import math

import pytest

from memaop_triton.auto.agenda import Agenda


def begun(seconds):
    agenda = Agenda()
    for steps in range(1, 1 << 13):
        if agenda.asks_for_seconds(steps):
            agenda.begin(steps, seconds(steps))
    return list(agenda.looks)


@pytest.mark.parametrize(
    ("seconds", "looks"), [(1.0, [5, 9, 13]), (0.1, [30, 34, 38]), (1e-3, [3000, 3004, 3008])]
)
def test_the_first_three_seconds_are_left_alone(seconds, looks):
    assert begun(lambda _: seconds) == looks


def test_steps_whose_times_are_not_known_yet_are_asked_for_again():
    assert begun(lambda steps: 1.0 if steps >= 20 else math.nan) == [33, 37, 41]
    assert begun(lambda _: math.nan) == []


def test_a_decision_follows_the_last_look():
    agenda = Agenda()
    assert not any(agenda.decides_after(step) for step in range(100))
    agenda.begin(4, 1.0)
    assert next(step for step in range(20) if agenda.decides_after(step)) == 13


@pytest.mark.parametrize("cost", [0.0, -0.1, 0.5, math.nan])
def test_looks_that_cost_little_come_as_often_as_patience_says(cost):
    agenda = Agenda(100)
    agenda.wait(47, cost)
    assert list(agenda.looks) == [72, 97, 122, 147]
    agenda.gain_confidence()
    agenda.wait(147, cost)
    assert list(agenda.looks) == [197, 247, 297, 347]
    agenda.start_over()
    agenda.wait(347, cost)
    assert list(agenda.looks) == [372, 397, 422, 447]


@pytest.mark.parametrize("cost", [0.6, 3.0, 40.0])
def test_looks_take_at_most_a_fiftieth_of_the_time(cost):
    agenda = Agenda(100)
    agenda.wait(1000, cost)
    assert len(agenda.looks) == 4
    assert 0.019 < cost * len(agenda.looks) / (agenda.looks[-1] - 1000) < 0.0201


def test_patience_has_an_end():
    agenda = Agenda()
    for _ in range(100):
        agenda.gain_confidence()
    assert agenda.patience == 1600
