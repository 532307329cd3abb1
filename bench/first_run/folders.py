"""Where a run keeps what it finds, unless it is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def default(*, is_dry: bool) -> Path:
    """`bench/results/<gpu>`; without one, and of a dry run, a folder that git ignores."""
    if is_dry:
        return ROOT / "build" / "gpu-dry"
    command = [sys.executable, "-m", "memaop_triton.bench.machine"]
    try:
        # By another process: this one is not to wait for a driver.
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
        )
        name = done.stdout.strip() or "gpu"
    except subprocess.TimeoutExpired:
        name = "gpu"
    return ROOT / "build" / "gpu" if name == "cpu" else ROOT / "bench" / "results" / name
