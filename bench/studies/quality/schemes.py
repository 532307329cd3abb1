"""How weight gradients are computed: a table with a line per scheme, and which cells are run."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from memaop_triton import MemAOPConfig, Rows, Subspace
from memaop_triton.bench.studies.quality.tasks import TASKS, Task

#: Raise it when `training` or `data` changes what a run gives.
PROTOCOL = 1

DENSE = "dense"
WHOLE = "1"  # the ratio of dense
#: Dense, trained for fewer steps: what dense reaches in the time that a cheaper step takes.
SHORTER = "dense-shorter"
#: Dense, in as many steps of fewer rows: the other way to make a step cheaper.
SMALLER = "dense-smaller"
#: Of the steps, and of the rows.
DENSE_SHARES = {SHORTER: ("3/4", "1/2"), SMALLER: ("3/4", "1/2", "1/4")}
RATIOS = ("1/2", "1/4", "1/8", "1/16", "1/32")
ALL_RATIOS = ("3/4", *RATIOS)
#: Where all schemes are compared, and where those that sample dX as well are.
RATIO, RATIO_OF_BOTH = "1/8", "1/4"


@dataclass(frozen=True)
class Scheme:
    """One way to compute weight gradients.

    Attributes:
        name: Key on the command line and in files.
        label: For readers.
        make: From a ratio to the configuration; `None` for dense.
        cheapens_both: Whether dX is sampled or projected too.
        allocates: Whether the ratio is a budget that `allocate_` spreads over the layers.
    """

    name: str
    label: str
    make: Callable[[float], MemAOPConfig] | None
    cheapens_both: bool = False
    allocates: bool = False

    def config(self, ratio: str) -> MemAOPConfig | None:
        """The configuration at a ratio like `"1/8"`."""
        return None if self.make is None else self.make(value_of(ratio))


def _of(
    selection: str, memory: Subspace | Rows | str, grad_input: str = "exact"
) -> Callable[[float], MemAOPConfig]:
    return lambda ratio: MemAOPConfig(
        ratio=ratio, selection=selection, memory=memory, grad_input=grad_input
    )


def _within(share: float, **settings: Any) -> Callable[[float], MemAOPConfig]:
    return lambda ratio: MemAOPConfig(budget=share * ratio, **settings)


# In the order in which they are run and shown. A budget is cut by a tenth, which pays for the
# output layer that stays dense: the ratio is then that of all weight gradients of the network.
_TABLE: tuple[tuple[str, str, Callable[[float], MemAOPConfig]], ...] = (
    ("budget", "default in a budget", _within(0.9)),
    ("subspace", "priority + subspace", _of("priority", "subspace")),
    ("priority", "priority", _of("priority", "none")),
    ("topk-residual", "topk + residual (paper)", _of("topk", "residual")),
    ("topk-signed", "topk + signed", _of("topk", "signed")),
    ("topk", "topk", _of("topk", "none")),
    ("randk-residual", "randk + residual (paper)", _of("randk", "residual")),
    ("weightedk-residual", "weightedk + residual (paper)", _of("weightedk", "residual")),
    ("randk-signed", "randk + signed", _of("randk", "signed")),
    ("topk-signed-half", "topk + signed, decay ½", _of("topk", Rows(signed=True, decay=0.5))),
    ("randk-rescaled", "randk, rescaled", _of("uniform", "none")),
    ("crs", "crs", _of("crs", "none")),
    ("bernoulli", "bernoulli", _of("bernoulli", "none")),
    ("wta", "wta", _of("wta", "none")),
)
_TABLE_OF_ALLOCATED: tuple[tuple[str, str, Callable[[float], MemAOPConfig]], ...] = (
    ("budget-allocated", "default in a budget, allocated", _within(0.9)),
    ("priority-allocated", "priority, allocated", _of("priority", "none")),
)
_PROJECTED = _within(0.9, grad_input="projected")
_TABLE_OF_BOTH: tuple[tuple[str, str, Callable[[float], MemAOPConfig]], ...] = (
    (
        "budget-both",
        "default in a budget, dX sampled",
        _within(0.9, grad_input="sampled"),
    ),
    (
        "subspace-both",
        "priority + subspace, dX sampled",
        _of("priority", "subspace", grad_input="sampled"),
    ),
    (
        "priority-both",
        "priority, dX sampled",
        _of("priority", "none", grad_input="sampled"),
    ),
    ("budget-projected", "default in a budget, dX projected", _PROJECTED),
)
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(DENSE, "dense", None),
        Scheme(SHORTER, "dense, fewer steps", None),
        Scheme(SMALLER, "dense, smaller batch", None),
        *(Scheme(*line) for line in _TABLE),
        *(Scheme(*line, allocates=True) for line in _TABLE_OF_ALLOCATED),
        *(Scheme(*line, cheapens_both=True) for line in _TABLE_OF_BOTH),
        Scheme(
            "budget-projected-allocated",
            "default in a budget, allocated, dX projected",
            _PROJECTED,
            cheapens_both=True,
            allocates=True,
        ),
    )
}

# Runs of seconds cover the whole grid. Those of minutes take a few schemes to all ratios and the
# others to one; those of a quarter of an hour repeat the comparisons that matter, and those with
# larger batches ask from which size on a cheaper step pays.
_MEDIUM = ("fashion", "vit", "gpt-128")
_BEST_OF_BOTH = "budget-projected-allocated"
_MAIN = ("budget", "budget-allocated", "priority", "topk-residual", "topk-signed", _BEST_OF_BOTH)
_AT_EQUAL_TIME = ("1/8", "1/4", "1/2")
_BOTH = {
    "budget-both": (RATIO_OF_BOTH,),
    "budget-projected": (RATIO_OF_BOTH,),
    _BEST_OF_BOTH: _AT_EQUAL_TIME,
}
_IN_LONG_TASKS = {
    "budget": _AT_EQUAL_TIME,
    "budget-allocated": _AT_EQUAL_TIME,
    "priority": ("1/8",),
    "topk-residual": ("1/8",),
    "topk-signed": ("1/8",),
    **_BOTH,
    **DENSE_SHARES,
}
_WITH_LARGER_BATCHES = {"budget": ("1/8",), **_BOTH, **DENSE_SHARES}
_FEW_CELLS = {
    "gpt-512": _IN_LONG_TASKS,
    "gpt-256": _IN_LONG_TASKS,
    "gpt-128-64": _WITH_LARGER_BATCHES,
    "gpt-128-256": _WITH_LARGER_BATCHES,
    "fashion-1024": _WITH_LARGER_BATCHES,
    "vit-512": _WITH_LARGER_BATCHES,
}
LONG_TASKS = tuple(_FEW_CELLS)


class Cell(NamedTuple):
    """A task under a scheme at a ratio."""

    task: str
    scheme: str
    ratio: str

    @property
    def is_known(self) -> bool:
        """Whether its names stand for something."""
        return self.task in TASKS and self.scheme in SCHEMES

    @property
    def place(self) -> tuple[tuple[int, str], ...]:
        """Sorts cells as their names stand in the tables, unknown ones last."""
        tables = (list(TASKS), list(SCHEMES), [WHOLE, *ALL_RATIOS])
        pairs = zip(tables, self, strict=True)
        return tuple(
            (names.index(one) if one in names else len(names), one) for names, one in pairs
        )

    @property
    def problem(self) -> Task:
        """The task, in as many steps and with as large a batch as this cell trains."""
        task = TASKS[self.task]
        if self.scheme == SHORTER:
            return dataclasses.replace(task, steps=round(value_of(self.ratio) * task.steps))
        if self.scheme == SMALLER:
            return dataclasses.replace(task, batch=round(value_of(self.ratio) * task.batch))
        return task

    @property
    def has_own_steps(self) -> bool:
        """Whether a step takes another time than one of dense."""
        return self.scheme not in (DENSE, SHORTER)

    @property
    def config(self) -> MemAOPConfig | None:
        """What its layers are converted with."""
        return SCHEMES[self.scheme].config(self.ratio)

    @property
    def dense(self) -> Cell:
        """What it is compared with."""
        return Cell(self.task, DENSE, WHOLE)

    @property
    def code(self) -> str:
        """Short hash of all that determines the result of a seed."""
        return code_of(self.problem, self.config, self.allocated)

    @property
    def allocated(self) -> float | None:
        """The budget that `allocate_` spreads, if the scheme has it do so."""
        config = self.config
        if config is None or not SCHEMES[self.scheme].allocates:
            return None
        return config.budget or config.ratio


def value_of(ratio: str) -> float:
    """0.125 for `"1/8"`."""
    above, _, below = ratio.partition("/")
    return int(above) / int(below or 1)


def cells(task: str) -> list[Cell]:
    """All cells of a task, dense first, then by importance."""
    return [Cell(task, DENSE, WHOLE), *(Cell(task, s, r) for s, r in _sampled(task))]


def _sampled(task: str) -> Iterator[tuple[str, str]]:
    """Schemes and ratios beside dense."""
    if task in _FEW_CELLS:
        few = _FEW_CELLS[task].items()
        yield from ((name, ratio) for name, ratios in few for ratio in ratios)
        return
    for name, scheme in SCHEMES.items():
        if name == DENSE or (name in DENSE_SHARES and task not in _MEDIUM):
            continue
        if name in DENSE_SHARES:
            yield from ((name, ratio) for ratio in DENSE_SHARES[name])
        elif task not in _MEDIUM or name in _MAIN:
            yield from ((name, ratio) for ratio in RATIOS)
        else:
            yield name, RATIO_OF_BOTH if scheme.cheapens_both else RATIO


def code_of(task: Task, config: MemAOPConfig | None, allocated: float | None = None) -> str:
    """Short hash of a task, a configuration and the budget that is spread over layers.

    A setting that is `None` does not count, so that one that is added to the library later changes
    nothing here unless it is used.
    """
    settings = [] if config is None else sorted(_settings_of(config))
    content = f"{PROTOCOL} {task!r} {settings!r}"
    content += "" if allocated is None else f" allocated {allocated}"
    return hashlib.sha256(content.encode()).hexdigest()[:10]


def _settings_of(part: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Name and value of every setting that is not `None`, with those of its parts."""
    for field in dataclasses.fields(part):
        value, full = getattr(part, field.name), f"{name}{field.name}"
        if dataclasses.is_dataclass(value):
            yield full, type(value).__name__
            yield from _settings_of(value, f"{full}.")
        elif value is not None:
            yield full, repr(value)
