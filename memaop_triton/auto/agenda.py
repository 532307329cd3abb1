"""Which steps of a training are observed, and when decisions are made."""

from __future__ import annotations

import math

from memaop_triton.auto.evidence import LOOKS

#: Seconds at the start of a training in which nothing is observed.
LEFT_ALONE = 3.0

_SETTLED = 4  # steps after which the seconds of one are first asked for
_FIRST_LOOKS, _APART = 3, 4
_REVIEW_AFTER = 100  # steps, at least
_LONGEST_REVIEW = 1600
_SPENT_ON_LOOKS = 0.02  # of the time between two decisions, at most


class Agenda:
    """Of one training, by the numbers of its steps, which count from 1.

    Seconds are not looked at but handed in, so that processes which hand in the same ones agree.

    Attributes:
        looks: The steps that are observed. After the last one comes a decision; there are none
            until `begin`.
        patience: Steps until the next decision, if observing them costs little.
    """

    def __init__(self, patience: int = _REVIEW_AFTER) -> None:
        self.looks = range(0)
        self.patience = patience

    def asks_for_seconds(self, steps: int) -> bool:
        """Whether `begin` wants to be called after so many steps: 4, 8, 16 and so on."""
        return not self.looks and steps >= _SETTLED and steps & (steps - 1) == 0

    def begin(self, steps: int, seconds: float) -> None:
        """After `steps` steps of `seconds` each; of no effect if these are not known, NaN."""
        if not math.isnan(seconds):
            first = max(steps + 1, math.ceil(LEFT_ALONE / seconds))
            self.looks = range(first, first + _FIRST_LOOKS * _APART, _APART)

    def decides_after(self, step: int) -> bool:
        """Whether it is time for a decision."""
        return bool(self.looks) and step >= self.looks[-1]

    def wait(self, steps: int, cost: float = 0.0) -> None:
        """Look ahead to the next decision after `steps` steps.

        Args:
            steps: That were taken.
            cost: What observing one takes in addition, in steps; NaN if that is not known.
        """
        affordable = math.ceil(LOOKS * cost / _SPENT_ON_LOOKS) if cost > 0 else 0
        every = max(self.patience, affordable) // LOOKS
        self.looks = range(steps + every, steps + LOOKS * every + 1, every)

    def gain_confidence(self) -> None:
        """Decide twice as rarely from now on."""
        self.patience = min(2 * self.patience, _LONGEST_REVIEW)

    def start_over(self) -> None:
        """Decide as often as at first."""
        self.patience = _REVIEW_AFTER
