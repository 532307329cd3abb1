"""A task of half a second on data that needs no file, and runs made up for reports."""

from memaop_triton.bench.studies.quality import tuning
from memaop_triton.bench.studies.quality.networks import Mlp
from memaop_triton.bench.studies.quality.schemes import Cell
from memaop_triton.bench.studies.quality.store import Run
from memaop_triton.bench.studies.quality.tasks import Optimizer, Task
from memaop_triton.bench.studies.quality.training import Outcome, Point, Score

TASK = Task(
    "tiny",
    "Digits, MLP 64-24-16-10",
    "digits",
    Mlp((64, 24, 16, 10)),
    Optimizer("adam", 3e-3),
    64,
    20,
    "accuracy",
)


def with_lr(lr):
    return tuning.with_rate(TASK, lr)


def outcome(accuracy=90.0, loss=0.3, diverged_at=0):
    curve = tuple(Point(step, loss + 1 / step, accuracy - 1 / step) for step in (10, 20))
    return Outcome(Score(loss, accuracy), curve, diverged_at, 1.5)


def run(scheme="dense", ratio="1", seed=0, *, task="tiny", code=None, weight_grads=1.0, **values):
    """A run and its outcome."""
    cell, result = Cell(task, scheme, ratio), outcome(**values)
    counted = (weight_grads, 2.0)
    row = Run(
        *cell, seed, code or cell.code, *result.score, result.diverged_at, *counted, result.seconds
    )
    return row, result


def trial(lr, accuracy, seed=0):
    code = tuning.code_of(with_lr(lr), None)
    return tuning.Trial("tiny", lr, seed, code, 100 - accuracy, accuracy)
