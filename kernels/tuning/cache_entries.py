"""What a file of tuned configurations says: its parts, and the checks that they have to pass.

    {"schema": 1, "gpu": "NVIDIA H100 80GB HBM3", "capability": "9.0", "processors": 132,
     "kernel": "gather_gemm",
     "entries": [{"problem": "bfloat16 M=16384 K=2048 ...", "config": {"block_n": 128, ...}, ...}]}

A file may be broken, or written by anybody: what passes are names, and numbers within bounds.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from memaop_triton.kernels.tuning.defaults import Config, GemmConfig, RowConfig
from memaop_triton.kernels.tuning.problem import KERNELS

SCHEMA = 1
_CONFIGS: dict[str, type[GemmConfig] | type[RowConfig]] = {
    kernel: GemmConfig if kernel.endswith("_gemm") else RowConfig for kernel in KERNELS
}
# Least and most of a field; anything a kernel takes lies within.
_BOUNDS = {
    "block_n": (16, 512),
    "block_p": (16, 512),
    "block_k": (16, 512),
    "block_m": (1, 1024),
    "block_c": (16, 4096),
    "num_warps": (1, 32),
    "num_stages": (1, 8),
    "split_k": (1, 256),
    "split": (1, 256),
    "group": (1, 64),
    "tiles_n": (1, 2),
}
_ANY_BOUNDS = (0, 4096)


class ConfigFileError(Exception):
    """A file that cannot be used.

    Attributes:
        replaceable: Whether nothing is lost when it is written anew. It is not for a file of
            another version of the package or of another GPU.
    """

    def __init__(self, reason: str, *, replaceable: bool) -> None:
        super().__init__(reason)
        self.replaceable = replaceable


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: configurations that were tuned on one serve on every other of its kind.

    Attributes:
        name: As its driver spells it.
        capability: "9.0" or "gfx942".
        processors: Streaming multiprocessors (compute units).
    """

    name: str
    capability: str
    processors: int

    @property
    def slug(self) -> str:
        """The name as a folder: "nvidia-h100-80gb-hbm3"."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") or "gpu"


@dataclass(frozen=True)
class Entry:
    """The outcome of tuning one problem.

    Attributes:
        problem: `Problem.key`.
        config: Fields of the configuration by name.
        milliseconds: Median time of a launch.
        heuristic_milliseconds: The same of the configuration that serves without tuning, `None` if
            that one does not run.
        source: Hash of the kernel's source files.
        triton: Version of Triton that compiled it.
        torch: Version of PyTorch.
        tuned: When: UTC, ISO 8601.
    """

    problem: str
    config: Mapping[str, int]
    milliseconds: float
    heuristic_milliseconds: float | None
    source: str
    triton: str
    torch: str
    tuned: str

    @property
    def identity(self) -> tuple[str, str, str]:
        """Entries that agree in this are about the same: the newer replaces the older."""
        return self.problem, self.source, self.triton


@dataclass(frozen=True)
class ConfigFile:
    """The contents of one file.

    Attributes:
        refused: What is wrong with entries that were left out.
    """

    gpu: Gpu
    kernel: str
    entries: tuple[Entry, ...]
    refused: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What `parse` reads."""
        return {
            "schema": SCHEMA,
            "gpu": self.gpu.name,
            "capability": self.gpu.capability,
            "processors": self.gpu.processors,
            "kernel": self.kernel,
            "entries": [dataclasses.asdict(entry) for entry in self.entries],
        }


def now() -> str:
    """The time as an entry has it."""
    return written(datetime.now(UTC))


def written(moment: datetime) -> str:
    """A time in UTC as text of one length, so that the later of two is the greater."""
    return moment.isoformat(timespec="microseconds")


def fields_of(config: Config) -> dict[str, int]:
    """What an `Entry` keeps of a configuration."""
    return dataclasses.asdict(config)


def config_of(kernel: str, fields: Mapping[str, int]) -> Config:
    """The configuration with these fields.

    Raises:
        ValueError: A field is missing, unknown, of another type, or out of bounds.
    """
    kind: Any = _CONFIGS[kernel]
    known = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    if fields.keys() != known.keys():
        names = ", ".join(sorted(fields.keys() ^ known.keys()))
        raise ValueError(f"config: fields missing or unknown: {names}")
    for name, value in fields.items():
        if isinstance(value, bool) != (known[name] == "bool"):
            raise ValueError(f"config: {name}={value!r} is not of type {known[name]}")
        least, most = _BOUNDS.get(name, _ANY_BOUNDS)
        if not isinstance(value, bool) and not least <= value <= most:
            raise ValueError(f"config: {name}={value} is not in {least}..{most}")
        by_twos = name.startswith("block_") or name in ("num_warps", "tiles_n")
        if by_twos and value & (value - 1):
            raise ValueError(f"config: {name}={value} is not a power of two")
    config: Config = kind(**fields)
    return config


def parse(content: object) -> ConfigFile:
    """Check what a file says; entries that are wrong are left out and told of in `refused`.

    Raises:
        ConfigFileError: It is not such a file, or one of another schema.
    """
    if not isinstance(content, dict) or not isinstance(content.get("schema"), int):
        raise ConfigFileError("it holds no tuned configurations", replaceable=True)
    if content["schema"] != SCHEMA:
        reason = f"its schema is {content['schema']}, this version reads {SCHEMA}"
        raise ConfigFileError(reason, replaceable=False)
    try:
        gpu = Gpu(
            _text(content, "gpu"), _text(content, "capability"), _count(content, "processors")
        )
        kernel = _text(content, "kernel")
        if kernel not in KERNELS:
            raise ValueError(f"kernel={kernel!r} is not one of {', '.join(KERNELS)}")
        if not isinstance(content.get("entries"), list):
            raise ValueError("entries is not a list")
    except ValueError as error:
        raise ConfigFileError(str(error), replaceable=True) from error
    entries, refused = [], []
    for one in content["entries"]:
        try:
            entries.append(_entry(one))
        except ValueError as error:
            refused.append(str(error))
    return ConfigFile(gpu, kernel, tuple(entries), tuple(refused))


def check_owner(file: ConfigFile, gpu: Gpu, kernel: str) -> None:
    """Raise `ConfigFileError` if a file is about another GPU or kernel than it should be."""
    if (file.gpu, file.kernel) != (gpu, kernel):
        reason = f"it is about {file.kernel} on {file.gpu}, not {kernel} on {gpu}"
        raise ConfigFileError(reason, replaceable=False)


def _entry(content: object) -> Entry:
    if not isinstance(content, dict):
        raise ValueError("an entry is not an object")
    config = content.get("config")
    if not isinstance(config, dict) or not all(isinstance(v, int) for v in config.values()):
        raise ValueError("config is not an object of numbers")
    heuristic = content.get("heuristic_milliseconds")
    tuned = datetime.fromisoformat(_text(content, "tuned"))
    if tuned.utcoffset() != timedelta(0):
        raise ValueError(f"tuned={content['tuned']!r} is not a time in UTC")
    return Entry(
        _text(content, "problem"),
        config,
        _positive(content, "milliseconds"),
        None if heuristic is None else _positive(content, "heuristic_milliseconds"),
        _text(content, "source"),
        _text(content, "triton"),
        _text(content, "torch"),
        written(tuned),
    )


def _text(content: dict[str, Any], name: str) -> str:
    value = content.get(name)
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= 500:
        raise ValueError(f"{name} is not a printable text of 1 to 500 characters")
    return value


def _count(content: dict[str, Any], name: str) -> int:
    value = content.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} is not a positive integer")
    return value


def _positive(content: dict[str, Any], name: str) -> float:
    value = content.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ValueError(f"{name}={value!r} is not a positive time")
    return float(value)
