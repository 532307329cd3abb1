"""The processor of this machine, as the operating system describes it."""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path

import torch


def processor_name() -> str:
    """Model name of the processor."""
    return facts().get("model name") or platform.processor() or platform.machine()


def vendor() -> str:
    """ "GenuineIntel", "AuthenticAMD", ...; "" if unknown."""
    return facts().get("vendor_id", "")


def usable_cores() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def caches() -> dict[str, str]:
    """Sizes of the caches of the first core by name, "L2": "1024K"; empty on other than Linux."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (read_text(folder / field) for field in ("level", "type", "size"))
        found[f"L{level}{'' if kind == 'Unified' else kind[:1].lower()}"] = size
    return found


def blas() -> str:
    """The BLAS that PyTorch was built with."""
    found = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return found[1] if found else "unknown"


@functools.cache
def facts() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo; empty on other than Linux."""
    first = read_text(Path("/proc/cpuinfo")).split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def read_text(path: Path) -> str:
    """The text of a file, without white space around it; "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
