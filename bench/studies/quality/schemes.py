"""How weight gradients are computed: a table with a line per scheme, and which cells are run."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from memaop_triton import MemAOPConfig, Rows, Subspace
from memaop_triton.bench.studies.quality.tasks import TASKS, Task
from memaop_triton.bench.studies.quality.training import Trainer

#: Raise it when `training` or `data` changes what a run gives.
PROTOCOL = 1

DENSE = "dense"
WHOLE = "1"  # the ratio of dense
#: Dense, trained for fewer steps: what dense reaches in the time that a cheaper step takes.
SHORTER = "dense-shorter"
#: Dense, in as many steps of fewer rows: the other way to make a step cheaper.
SMALLER = "dense-smaller"
#: The library decides; the ratio is `WHOLE`. What it decides hangs on times, so that these runs
#: need the machine for themselves (`decided`).
AUTO = "auto"
AUTO_STASH = "auto-int4"
#: In each step so many of the layers have an exact gradient, and the others none.
ROTATING = "rotating"
#: What is kept of the inputs is rounded: of all rows (`WHOLE`), or of rows that are sampled.
STASH = "stash-int4"
#: Of the steps, and of the rows.
DENSE_SHARES = dict.fromkeys((SHORTER, SMALLER), ("7/8", "3/4", "1/2", "1/4"))
RATIOS = ("1/2", "1/4", "1/8", "1/16", "1/32")
ALL_RATIOS = ("7/8", "3/4", *RATIOS)
#: Where all schemes are compared, and where those that sample dX as well are.
RATIO, RATIO_OF_BOTH = "1/8", "1/4"


@dataclass(frozen=True)
class Scheme:
    """One way to compute weight gradients.

    Attributes:
        name: Key on the command line and in files.
        label: For readers.
        make: From a ratio to the configuration; `None` for dense.
        allocates: Whether the ratio is a budget that `allocate_` spreads over the layers.
        rotates: Whether it is the share of the layers that are trained in a step.
    """

    name: str
    label: str
    make: Callable[[float], MemAOPConfig] | None = None
    allocates: bool = False
    rotates: bool = False

    @property
    def cheapens_both(self) -> bool:
        """Whether dX is sampled or projected too."""
        return self.make is not None and self.make(1 / 8).grad_input_name != "exact"

    @property
    def has_ratios(self) -> bool:
        """Whether it samples K of M rows with a ratio that is given, as a part of the grid."""
        return self.make is not None and self.name not in (AUTO, STASH, AUTO_STASH)

    @property
    def decides(self) -> bool:
        """Whether the library sets the ratio."""
        return self.make is not None and self.make(1 / 8).is_auto


def _rows(
    selection: str, memory: Subspace | Rows | str, grad_input: str = "exact"
) -> Callable[[float], MemAOPConfig]:
    return lambda ratio: MemAOPConfig(
        ratio=ratio, selection=selection, memory=memory, grad_input=grad_input
    )


def _budget(grad_input: str = "exact") -> Callable[[float], MemAOPConfig]:
    """The default at the ratio of all weight gradients of the network.

    A tenth less than that, which makes up for the output layer that stays dense.
    """
    return lambda ratio: MemAOPConfig(budget=0.9 * ratio, grad_input=grad_input)


_BEST_OF_BOTH = "budget-projected-allocated"
# In the order in which they are run and shown.
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(DENSE, "dense"),
        Scheme(SHORTER, "dense, fewer steps"),
        Scheme(SMALLER, "dense, smaller batch"),
        Scheme(ROTATING, "dense, layers in turn", rotates=True),
        Scheme(AUTO, "the library decides", lambda ratio: MemAOPConfig(ratio="auto")),
        Scheme("budget", "default in a budget", _budget()),
        Scheme("subspace", "priority + subspace", _rows("priority", "subspace")),
        Scheme(
            STASH,
            "priority + subspace, int4 stash",
            lambda ratio: MemAOPConfig(ratio=ratio, stash="int4"),
        ),
        Scheme(
            AUTO_STASH,
            "the library decides, int4 stash",
            lambda ratio: MemAOPConfig(ratio="auto", stash="int4"),
        ),
        Scheme("priority", "priority", _rows("priority", "none")),
        Scheme("topk-residual", "topk + residual (paper)", _rows("topk", "residual")),
        Scheme("topk-signed", "topk + signed", _rows("topk", "signed")),
        Scheme("topk", "topk", _rows("topk", "none")),
        Scheme("randk-residual", "randk + residual (paper)", _rows("randk", "residual")),
        Scheme(
            "weightedk-residual", "weightedk + residual (paper)", _rows("weightedk", "residual")
        ),
        Scheme("randk-signed", "randk + signed", _rows("randk", "signed")),
        Scheme(
            "topk-signed-half",
            "topk + signed, decay ½",
            _rows("topk", Rows(signed=True, decay=0.5)),
        ),
        Scheme("randk-rescaled", "randk, rescaled", _rows("uniform", "none")),
        Scheme("crs", "crs", _rows("crs", "none")),
        Scheme("bernoulli", "bernoulli", _rows("bernoulli", "none")),
        Scheme("wta", "wta", _rows("wta", "none")),
        Scheme("budget-allocated", "default in a budget, allocated", _budget(), allocates=True),
        Scheme(
            "priority-allocated",
            "priority, allocated",
            _rows("priority", "none"),
            allocates=True,
        ),
        Scheme("budget-both", "default in a budget, dX sampled", _budget("sampled")),
        Scheme(
            "subspace-both",
            "priority + subspace, dX sampled",
            _rows("priority", "subspace", "sampled"),
        ),
        Scheme("priority-both", "priority, dX sampled", _rows("priority", "none", "sampled")),
        Scheme("budget-projected", "default in a budget, dX projected", _budget("projected")),
        Scheme(
            _BEST_OF_BOTH,
            "default in a budget, allocated, dX projected",
            _budget("projected"),
            allocates=True,
        ),
    )
}

# Runs of seconds cover the whole grid. Those of minutes take a few schemes to all ratios and the
# others to one; those of a quarter of an hour repeat the comparisons that matter, and those with
# larger batches show from which size on a cheaper step is better.
_MEDIUM = ("fashion", "vit", "gpt-128")
_MAIN = ("budget", "budget-allocated", "priority", "topk-residual", "topk-signed", _BEST_OF_BOTH)
_AT_EQUAL_TIME = ("1/8", "1/4", "1/2")
_DENSE_IN_LONG_TASKS = {SHORTER: ("3/4", "1/2", "1/4"), SMALLER: ("3/4", "1/2", "1/4")}
_DENSE_BESIDE_AUTO = {SHORTER: ("7/8", "3/4"), SMALLER: ("7/8", "3/4")}
_DECIDED = {AUTO: (WHOLE,)}
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
    **_DENSE_IN_LONG_TASKS,
    **_DECIDED,
}
_DECISIVE = {
    **_DECIDED,
    **_DENSE_BESIDE_AUTO,
    ROTATING: ("1/4",),
    "budget-allocated": _AT_EQUAL_TIME,
}
_OF_STASH = (WHOLE, RATIO)
_FINE_TUNING = {**_DECISIVE, "subspace": (RATIO,), STASH: _OF_STASH, AUTO_STASH: (WHOLE,)}
_WITH_LARGER_BATCHES = {"budget": ("1/8",), **_BOTH, **_DENSE_IN_LONG_TASKS, **_DECIDED}
_FEW_CELLS = {
    "gpt-512": _IN_LONG_TASKS,
    "gpt-256": _IN_LONG_TASKS,
    "gpt-128-64": _WITH_LARGER_BATCHES,
    "gpt-128-256": _WITH_LARGER_BATCHES,
    "fashion-1024": _WITH_LARGER_BATCHES,
    "vit-512": _WITH_LARGER_BATCHES,
    "mlp-mnist": {**_DECISIVE, SHORTER: ("3/4", "1/2"), SMALLER: ("3/4", "1/2")},
    "resnet": {**_DECIDED, **_DENSE_BESIDE_AUTO},
    **dict.fromkeys(("mlp", "mlp-shifted", "minilm-mean", "r8-mean", "gpt-prompted"), _DECISIVE),
    **dict.fromkeys(("minilm", "r8"), _FINE_TUNING),
}
LONG_TASKS = tuple(_FEW_CELLS)


class Cell(NamedTuple):
    """A task under a scheme at a ratio."""

    task: str
    scheme: str
    ratio: str

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
        """Whether all steps take another time than those of dense, and the same one."""
        return self.scheme not in (DENSE, SHORTER) and not SCHEMES[self.scheme].decides

    @property
    def config(self) -> MemAOPConfig | None:
        """What its layers are converted with."""
        make = SCHEMES[self.scheme].make
        return None if make is None else make(value_of(self.ratio))

    @property
    def dense(self) -> Cell:
        """What it is compared with."""
        return Cell(self.task, DENSE, WHOLE)

    @property
    def code(self) -> str:
        """Short hash of all that determines the result of a seed."""
        return code_of(self.problem, self.config, self.allocated, self.rotating)

    def has_code(self, code: str) -> bool:
        """Whether a result of that code is of the present task and configuration."""
        return self.task in TASKS and self.scheme in SCHEMES and self.code == code

    @property
    def allocated(self) -> float | None:
        """The budget that `allocate_` spreads, if the scheme has it do so."""
        config = self.config
        if config is None or not SCHEMES[self.scheme].allocates:
            return None
        return config.budget or (None if isinstance(config.ratio, str) else config.ratio)

    @property
    def rotating(self) -> float | None:
        """The share of the layers that are trained in a step, if not all are."""
        return value_of(self.ratio) if SCHEMES[self.scheme].rotates else None

    def trainer(self, task: Task, seed: int) -> Trainer:
        """What trains `problem`, located, as the scheme has it."""
        return Trainer(task, self.config, seed, allocated=self.allocated, rotating=self.rotating)


def value_of(ratio: str) -> float:
    """0.125 for `"1/8"`."""
    above, _, below = ratio.partition("/")
    return int(above) / int(below or 1)


def cells(task: str) -> list[Cell]:
    """All cells of a task, dense first, then by importance."""
    others = _FEW_CELLS.get(task) or {name: _ratios(task, name) for name in SCHEMES}
    return [
        Cell(task, DENSE, WHOLE),
        *(Cell(task, name, ratio) for name, ratios in others.items() for ratio in ratios),
    ]


def _ratios(task: str, scheme: str) -> tuple[str, ...]:
    """Those of a scheme in a task that has no table of its own."""
    if scheme in (DENSE, ROTATING):
        return ()
    if scheme == AUTO:
        return (WHOLE,)
    if scheme in (STASH, AUTO_STASH):
        return {STASH: _OF_STASH, AUTO_STASH: (WHOLE,)}[scheme] if task == "gpt-128" else ()
    if scheme in DENSE_SHARES:
        of_all = scheme == SHORTER or task in _MEDIUM
        return _DENSE_IN_LONG_TASKS[scheme] if of_all else ()
    if task not in _MEDIUM or scheme in _MAIN:
        return RATIOS
    return (RATIO_OF_BOTH if SCHEMES[scheme].cheapens_both else RATIO,)


def code_of(
    task: Task,
    config: MemAOPConfig | None,
    allocated: float | None = None,
    rotating: float | None = None,
) -> str:
    """Short hash of a task, a configuration, the budget of `allocate_`, and the share of layers.

    A setting that is `None` does not count, nor one of `_LATER` with that value, so that one that
    is added to the library later changes nothing here unless it is used.
    """
    settings = [] if config is None else sorted(_settings_of(config))
    content = f"{PROTOCOL} {task!r} {settings!r}"
    content += "" if allocated is None else f" allocated {allocated}"
    content += "" if rotating is None else f" rotating {rotating}"
    return hashlib.sha256(content.encode()).hexdigest()[:10]


# Settings that came after the first runs, and what they were fixed to before.
_LATER = {"scores": "norms", "stash": "exact"}


def _settings_of(part: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Name and value of every setting that counts, with those of its parts."""
    for field in dataclasses.fields(part):
        value, full = getattr(part, field.name), f"{name}{field.name}"
        if dataclasses.is_dataclass(value):
            yield full, type(value).__name__
            yield from _settings_of(value, f"{full}.")
        elif value is not None and _LATER.get(full) != value:
            yield full, repr(value)
