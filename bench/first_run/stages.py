"""The stages of a run in their order, and the time that each may take."""

from __future__ import annotations

from dataclasses import dataclass

TOTAL_SECONDS = 600.0
PAGE_SECONDS = 10.0  # kept for the page and for processes that are slow to end


@dataclass(frozen=True)
class Stage:
    """A part of a run, in processes of its own.

    Attributes:
        name: Of the stage, and of the module that has its cases, with "_" for a space.
        about: A line for the page.
        seconds: It may take so long, and what the stages before it left.
        silence: A process that is at one case for so many seconds is taken for stuck, and ended.
        workers: Processes that share the cases, at most. Compiling is most of the work of stages
            that measure no time.
    """

    name: str
    about: str
    seconds: float
    silence: float
    workers: int = 1


STAGES = (
    Stage("device", "what there is", 30, 30),
    Stage("smoke", "every kernel, values against float64", 60, 40, workers=8),
    Stage("gpu tests", "tests/gpu", 180, 90, workers=8),
    Stage("times", "weight gradients and steps beside the vendor's library", 180, 60),
    Stage("compiling", "the tiles to try", 60, 40, workers=8),
    Stage("tuning", "the tiles to try, timed", 60, 40),
)


def limit_of(stage: Stage, spent: float) -> float:
    """Seconds that a stage may take when the run has taken `spent` so far."""
    later = sum(one.seconds for one in STAGES[STAGES.index(stage) + 1 :])
    return max(1.0, TOTAL_SECONDS - PAGE_SECONDS - later - spent)
