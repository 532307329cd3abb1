"""The sets of benchmarks that `memaop-triton bench` runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Suite:
    """A set of benchmarks, and how long one of them may take.

    Attributes:
        device: What it needs.
        budget: Seconds for the rounds of one comparison, beside `measure.FEWEST_ROUNDS`.
        about: For `--help`.
    """

    device: str
    budget: float
    about: str


SUITES = {
    "quick": Suite("cpu", 1.5, "a look at every kind of benchmark, three minutes on two cores"),
    "cpu": Suite("cpu", 6.0, "everything on the CPU, eleven minutes on two cores"),
    "gpu": Suite("cuda", 2.0, "everything on a GPU"),
    "memory": Suite(
        "cpu", 6.0, "what a training step holds, on a GPU if there is one; ten minutes on two cores"
    ),
    # Shows in a few seconds that all of it runs; its numbers mean nothing.
    "smoke": Suite("cpu", 0.0, "tiny problems"),
}
