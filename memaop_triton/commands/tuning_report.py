"""How `tune` shows what it does: a bar per problem, and a table in the end."""

from __future__ import annotations

from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from memaop_triton.kernels.tuning.config import Config, Problem, in_words
from memaop_triton.kernels.tuning.tuner import Observer, Tuned


class ProgressBars(Observer):
    """Moves a bar for every problem.

    Attributes:
        outcomes: Problems and what came of them, in order; `None` if no configuration runs.
    """

    def __init__(self, bars: Progress) -> None:
        self.outcomes: list[tuple[Problem, Tuned | None]] = []
        self._bars = bars
        self._task = TaskID(0)
        self._best: float | None = None

    def begin(self, problem: Problem, count: int) -> None:
        """Start a bar."""
        self._best = None
        title = f"{problem.kernel} {problem.key}"
        self._task = self._bars.add_task(title, total=count, last="")

    def timed(self, config: Config, milliseconds: float | None) -> None:
        """Move it."""
        if milliseconds is not None:
            self._best = min(milliseconds, self._best or milliseconds)
        last = "" if self._best is None else f"best {self._best:.4f} ms"
        self._bars.update(self._task, advance=1, last=last)

    def end(self, problem: Problem, tuned: Tuned | None) -> None:
        """Remember the outcome."""
        self.outcomes.append((problem, tuned))


def table(outcomes: list[tuple[Problem, Tuned | None]]) -> Table:
    """A line per problem: the heuristic's time, the best, and the configuration that has it."""
    made = Table("kernel", "problem")
    for title in ("heuristic ms", "best ms", "gain"):
        made.add_column(title, justify="right")
    made.add_column("configuration")
    for problem, tuned in outcomes:
        words = ["–", "–", "–", "none runs"]
        if tuned is not None:
            before = tuned.heuristic_milliseconds
            words = [
                "–" if before is None else f"{before:.4f}",
                f"{tuned.milliseconds:.4f}",
                "–" if before is None else f"{before / tuned.milliseconds:.2f}×",
                in_words(tuned.config),
            ]
        made.add_row(*(Text(word) for word in (problem.kernel, problem.key, *words)))
    return made
