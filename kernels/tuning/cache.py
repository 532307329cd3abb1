"""What is known of tuned configurations: the user's cache, and what is shipped for some GPUs.

    $MEMAOP_TRITON_CACHE_DIR/configs/<gpu>/<kernel>.json     see `config_files`, `config_entries`
    kernels/configs/<gpu>/<kernel>.json                      the same, read only

A process reads a file when it first needs it, and again when it has changed it; what other
processes add in between, it learns at its next start. An entry of other kernel sources says nothing
here. One that another Triton compiled is stale: better than a guess, worth tuning anew. A file that
cannot be used or written is warned of once, and training goes on.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from memaop_triton.kernels.env import cache_folder
from memaop_triton.kernels.tuning import cache_files
from memaop_triton.kernels.tuning.cache_entries import (
    ConfigFile,
    ConfigFileError,
    Entry,
    Gpu,
    check_owner,
    config_of,
    fields_of,
    now,
)
from memaop_triton.kernels.tuning.defaults import Config
from memaop_triton.kernels.tuning.problem import Problem

SHIPPED = Path(__file__).parents[1] / "configs"
_PROGRAMS = Path(__file__).parents[1] / "gpu"

# The files whose text decides what a kernel's programs do.
_COMMON = ("primitives.py", "launch.py")
SOURCES = {
    "row_scores": ("score.py", *_COMMON),
    "accumulate_and_score": ("score.py", *_COMMON),
    "project": ("subspace.py", *_COMMON),
    "transposed_mm": ("subspace.py", *_COMMON),
    "gather_gemm": ("gather_gemm.py", *_COMMON),
    "residual_gemm": ("residual_gemm.py", "score.py", *_COMMON),
}


@dataclass(frozen=True)
class Found:
    """An entry that can be used.

    Attributes:
        is_stale: Whether another Triton compiled it.
        origin: "cache" or "shipped".
    """

    config: Config
    entry: Entry
    is_stale: bool
    origin: str


def folder() -> Path:
    """Where the user's files are."""
    return cache_folder("configs")


def path_of(root: Path, gpu: Gpu, kernel: str) -> Path:
    """The file of a kernel on a GPU below `folder()` or `SHIPPED`."""
    return root / gpu.slug / f"{kernel}.json"


@functools.cache
def source_hash(kernel: str) -> str:
    """Sixteen digits that change with the text of the kernel."""
    digest = hashlib.sha256()
    for name in SOURCES[kernel]:
        digest.update((_PROGRAMS / name).read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def triton_version() -> str:
    """Of the Triton that compiles here; "none" without one."""
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def entry_for(
    problem: Problem, config: Config, milliseconds: float, heuristic_milliseconds: float | None
) -> Entry:
    """What to remember of a problem that was tuned just now, by these versions."""
    return Entry(
        problem.key,
        fields_of(config),
        milliseconds,
        heuristic_milliseconds,
        source_hash(problem.kernel),
        triton_version(),
        torch.__version__,
        now(),
    )


def find(gpu: Gpu, problem: Problem) -> Found | None:
    """The user's entry for a problem, else a shipped one, else a stale one of either."""
    places = (_view(folder(), gpu, problem.kernel), _view(SHIPPED, gpu, problem.kernel))
    found = [view.best[problem.key] for view in places if problem.key in view.best]
    return min(found, key=lambda one: one.is_stale, default=None)


def add(gpu: Gpu, kernel: str, entry: Entry) -> None:
    """Remember an entry in this process, and in the user's file if that can be written."""
    root = folder()
    view = _view(root, gpu, kernel)
    view.own.append(entry)
    view.hold((*view.entries, entry))
    # Where writing failed once it is still tried, without waiting for anybody.
    timeout = 0.0 if root in _warned else cache_files.LOCK_SECONDS
    try:
        merged = cache_files.merge_into(
            view.path,
            ConfigFile(gpu, kernel, tuple(view.own)),
            source=source_hash(kernel),
            timeout=timeout,
        )
    except (OSError, NotImplementedError, ConfigFileError) as error:
        what = f"tuned configurations are not kept in {view.path}: {error}"
        _warn_once(root, f"{what}. They serve this process; MEMAOP_TRITON_CACHE_DIR moves them.")
    else:
        view.hold(merged.entries)


def forget() -> None:
    """Read every file again when it is next needed, and warn again."""
    _views.clear()
    _warned.clear()


class _View:
    """What this process knows of one file.

    Attributes:
        entries: All that are in it, and those that could not be written.
        own: Those that this process made.
        best: By problem, the ones that can be used.
    """

    def __init__(self, path: Path, gpu: Gpu, kernel: str, origin: str) -> None:
        self.path, self._kernel, self._origin = path, kernel, origin
        self.entries: tuple[Entry, ...] = ()
        self.own: list[Entry] = []
        self.best: dict[str, Found] = {}
        try:
            file = cache_files.read(path)
            if file is not None:
                check_owner(file, gpu, kernel)
        except ConfigFileError as error:
            _warn_once(path, f"tuned configurations in {path} are not used: {error}.")
        else:
            self.hold(() if file is None else file.entries, () if file is None else file.refused)

    def hold(self, entries: tuple[Entry, ...], refused: tuple[str, ...] = ()) -> None:
        """Take over what a file holds now."""
        self.entries, self.best, wrong = entries, {}, list(refused)
        usable = [entry for entry in entries if entry.source == source_hash(self._kernel)]
        # The one to use comes last: this Triton's, or else the newest.
        for entry in sorted(usable, key=lambda e: (e.triton == triton_version(), e.tuned)):
            try:
                config = config_of(self._kernel, entry.config)
            except ValueError as error:
                wrong.append(str(error))
                continue
            is_stale = entry.triton != triton_version()
            self.best[entry.problem] = Found(config, entry, is_stale, self._origin)
        if wrong:
            what = f"{len(wrong)} of the tuned configurations in {self.path} are not used"
            _warn_once(self.path, f"{what}: {wrong[0][:200]}.")


_views: dict[Path, _View] = {}
_warned: set[Path] = set()


def _view(root: Path, gpu: Gpu, kernel: str) -> _View:
    path = path_of(root, gpu, kernel)
    if path not in _views:
        _views[path] = _View(path, gpu, kernel, "shipped" if root == SHIPPED else "cache")
    return _views[path]


def _warn_once(place: Path, message: str) -> None:
    if place not in _warned:
        _warned.add(place)
        warnings.warn(message, RuntimeWarning, stacklevel=3)
