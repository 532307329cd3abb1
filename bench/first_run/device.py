"""The stage `device`: what the machine is, and whether there is anything to run on."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from typing import Any

import torch

from memaop_triton.bench.first_run import cases
from memaop_triton.bench.first_run.cases import Case, Place

#: That parts of a run do without, each with what is lost.
OPTIONAL = {
    "platformdirs": "the cache folder follows XDG_CACHE_HOME",
    "filelock": "tuned tiles are written without a lock",
    "typer": "tests of the command line are skipped",
    "rich": "tests of the command line are skipped",
}


def run(place: Place) -> int:
    """Describe the machine."""
    return cases.run(place, [Case("device", lambda: describe(place))])


def describe(place: Place) -> dict[str, Any]:
    """Name, versions, and under "obstacle" why no kernel can run, `None` if one can."""
    import numpy

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": numpy.__version__,
        "pytest": _version("pytest"),
        "missing": {n: lost for n, lost in OPTIONAL.items() if not _is_installed(n)},
        "processors": os.cpu_count(),
        "commit": _commit(),
        "gpu": None,
        "is_dry": place.is_dry,
    }
    if place.is_dry:
        return found | {"gpu": "none: Triton's interpreter on the CPU", "obstacle": None}
    if not torch.cuda.is_available():
        return found | {"obstacle": "there is no GPU: torch.cuda.is_available() is False"}
    return found | _gpu(place.device)


def _gpu(device: torch.device) -> dict[str, Any]:
    from memaop_triton import dispatch
    from memaop_triton.bench.machine import gpu_clocks
    from memaop_triton.kernels import targets

    properties: Any = torch.cuda.get_device_properties(device)
    target = targets.find(device)
    like, hip = torch.empty(0, device=device), torch.version.hip
    return {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "capability": targets.name_of(device),
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "cache": properties.L2_cache_size,
        "runtime": f"{'ROCm' if hip else 'CUDA'} {hip or torch.version.cuda}",
        "clocks": gpu_clocks(),
        "is_shared": _is_shared(),
        "predicted_as": target and target.chip.name,
        "obstacle": None if dispatch.runs_triton(like) else dispatch.explain(like),
    }


def _is_shared() -> bool:
    """Whether several processes may use the GPU at once, as far as `nvidia-smi` says."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return True
    command = [program, "--query-gpu=compute_mode", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return True
    return "exclusive" not in done.stdout.lower()


def _commit() -> str | None:
    """Of the checkout; `None` where git is missing or this is none."""
    folder = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _version(name: str) -> str | None:
    try:
        return str(importlib.import_module(name).__version__)
    except ImportError:
        return None
