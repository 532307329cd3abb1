"""Files of tuned configurations: one JSON file per GPU and kernel.

    $MEMAOP_TRITON_CACHE_DIR/configs/<gpu>/<kernel>.json     the user's
    kernels/configs/<gpu>/<kernel>.json                      shipped, read only

A process reads a file when it first needs it, and again when it adds to it; entries that other
processes add in between are not used. An entry of other kernel sources is dropped. An entry of
another Triton version is stale: it stays for processes with that version. For a file that cannot be
used or written there is one warning, and the heuristic chooses.

Several processes may share a file, so it is always replaced as a whole: lock, read again, merge,
write a temporary file, rename. A reader takes no lock and sees the file before or after, and a
process that is killed leaves at most a temporary file. Without the package filelock there is one
warning and no lock: of two processes that write at once, the entries of one may be lost.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from memaop_triton.kernels import targets
from memaop_triton.kernels.env import cache_folder
from memaop_triton.kernels.tuning.config import Config, GemmConfig, Problem, RowConfig

try:
    from filelock import FileLock
except ModuleNotFoundError:  # a checkout also runs in images that have little more than PyTorch
    FileLock = None  # type: ignore[assignment, misc]

SCHEMA = 3
LOCK_SECONDS = 5.0
SHIPPED = Path(__file__).parents[1] / "configs"
_PROGRAMS = Path(__file__).parents[1] / "gpu"

# Every kernel, and the files whose text decides what its programs do.
_COMMON = ("primitives.py", "launch.py", "sums.py")
SOURCES = {
    "row_scores": ("score.py", *_COMMON),
    "accumulate_and_score": ("score.py", *_COMMON),
    "project": ("subspace.py", "score.py", "row_weights.py", *_COMMON),
    "transposed_mm": ("subspace.py", "score.py", "row_weights.py", *_COMMON),
    "gather_gemm": ("gather_gemm.py", "row_weights.py", *_COMMON),
}


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: a configuration that was tuned on one is used on all others of its kind.

    Attributes:
        name: As its driver spells it.
        capability: "sm_90" or "gfx942".
        processors: Streaming multiprocessors (compute units): parts of a GPU have fewer.
    """

    name: str
    capability: str
    processors: int

    @property
    def slug(self) -> str:
        """All of it as a folder: "nvidia-h100-80gb-hbm3-sm-90-132"."""
        text = f"{self.name} {self.capability} {self.processors}".lower()
        return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


@dataclass(frozen=True)
class Entry:
    """The outcome of tuning one problem.

    Attributes:
        problem: `Problem.key`.
        config: The best configuration.
        milliseconds: Median time of a launch.
        heuristic_milliseconds: The same of the configuration that is used without tuning, `None` if
            that one does not run.
        source: Hash of the kernel's source files.
        triton: Version of Triton that compiled it.
        tuned: When: UTC, ISO 8601, to the second.
    """

    problem: str
    config: Config
    milliseconds: float
    heuristic_milliseconds: float | None
    source: str
    triton: str
    tuned: str

    @property
    def identity(self) -> tuple[str, str, str]:
        """Of two entries that agree in this one replaces the other."""
        return self.problem, self.source, self.triton


@dataclass(frozen=True)
class ConfigFile:
    """The contents of one file."""

    gpu: Gpu
    kernel: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Choice:
    """The configuration of a problem's launches.

    Attributes:
        origin: "cache", "shipped", "tuned" or "heuristic".
    """

    config: Config
    origin: str


@functools.cache
def gpu_of(device: torch.device) -> Gpu | None:
    """The kind of GPU of a device; `None` for a CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.name, targets.name_of(device), properties.multi_processor_count)


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
    """The entry of a problem that was tuned just now, with the present versions."""
    return Entry(
        problem=problem.key,
        config=config,
        milliseconds=milliseconds,
        heuristic_milliseconds=heuristic_milliseconds,
        source=source_hash(problem.kernel),
        triton=triton_version(),
        tuned=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def read(path: Path) -> ConfigFile | None:
    """The contents of a file, `None` if there is none.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not what `merge_into` writes, or of another schema.
    """
    try:
        content = json.loads(path.read_bytes())
        schema, kernel = content["schema"], content["kernel"]
        if schema != SCHEMA or kernel not in SOURCES:
            raise ValueError(f"schema {schema} of {kernel!r}, this version reads schema {SCHEMA}")
        kind = GemmConfig if kernel.endswith("_gemm") else RowConfig
        entries = (Entry(**one | {"config": kind(**one["config"])}) for one in content["entries"])
        return ConfigFile(Gpu(**content["gpu"]), kernel, tuple(entries))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (KeyError, TypeError) as error:
        raise ValueError(f"no tuned configurations ({error!r})") from error


def find(gpu: Gpu, problem: Problem) -> Choice | None:
    """The user's entry for a problem, else a shipped one."""
    wanted = problem.key, source_hash(problem.kernel), triton_version()
    for origin, root in (("cache", folder()), ("shipped", SHIPPED)):
        for entry in _entries(path_of(root, gpu, problem.kernel)):
            if entry.identity == wanted:
                return Choice(entry.config, origin)
    return None


def add(gpu: Gpu, kernel: str, entry: Entry) -> None:
    """Keep an entry in this process, and in the user's file if that can be written."""
    root = folder()
    path = path_of(root, gpu, kernel)
    own = _own.setdefault(path, [])
    own.append(entry)
    # After a failure writing is still tried, but without waiting for the lock.
    timeout = 0.0 if root in _warned else LOCK_SECONDS
    try:
        _known[path] = merge_into(path, ConfigFile(gpu, kernel, tuple(own)), timeout)
    except (OSError, NotImplementedError) as error:  # the latter by systems without locks
        _known[path] = _merged(_entries(path), own)
        what = f"tuned configurations are not kept in {path}: {error}"
        _warn_once(root, f"{what}. They serve this process; MEMAOP_TRITON_CACHE_DIR moves them.")


def forget() -> None:
    """Read every file again when it is next needed, and warn again."""
    for state in (_known, _own, _warned):
        state.clear()


_known: dict[Path, tuple[Entry, ...]] = {}  # what is in a file, and what could not be written
_own: dict[Path, list[Entry]] = {}  # what this process tuned
_warned: set[Path] = set()


def _entries(path: Path) -> tuple[Entry, ...]:
    if path not in _known:
        try:
            file = read(path)
        except (OSError, ValueError) as error:
            file = None
            _warn_once(path, f"tuned configurations in {path} are not used: {error}.")
        _known[path] = () if file is None else file.entries
    return _known[path]


def _warn_once(place: Path, message: str) -> None:
    if place not in _warned:
        _warned.add(place)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _merged(one: Iterable[Entry], other: Iterable[Entry]) -> tuple[Entry, ...]:
    found = {entry.identity: entry for entry in (*one, *other)}
    return tuple(found[identity] for identity in sorted(found))


def merge_into(path: Path, new: ConfigFile, timeout: float = LOCK_SECONDS) -> tuple[Entry, ...]:
    """Add entries to a file, which is made if there is none or what is there cannot be read.

    Args:
        path: The file.
        new: What to add; it replaces what is there about the same.
        timeout: Seconds to wait for another process that is writing.

    Returns:
        What the file holds afterwards: nothing of other kernel sources.

    Raises:
        OSError: It cannot be written, or another process holds the lock (`filelock.Timeout`).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock_of(path, timeout):
        try:
            there = read(path)
        except ValueError:
            there = None
        entries = tuple(
            entry
            for entry in _merged(there.entries if there else (), new.entries)
            if entry.source == source_hash(new.kernel)
        )
        for left in path.parent.glob(f".{path.name}.*"):  # by a process that was killed
            left.unlink(missing_ok=True)
        content = {"schema": SCHEMA, **asdict(ConfigFile(new.gpu, new.kernel, entries))}
        replace_file(path, json.dumps(content, indent=1))
    return entries


def _lock_of(path: Path, timeout: float) -> contextlib.AbstractContextManager[object]:
    if FileLock is not None:
        return FileLock(f"{path}.lock", timeout=timeout)
    _warn_once(
        Path("filelock"),
        "filelock is not installed: tuned configurations are written without a lock, so tune in "
        "one process at a time.",
    )
    return contextlib.nullcontext()


def replace_file(path: Path, text: str) -> None:
    """Write `text` to `path`; a concurrent reader sees all of it or the file as it was before."""
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        # Not by `tempfile`, whose files only their owner can read: the umask decides here.
        with part.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
