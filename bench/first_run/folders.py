"""Where a run keeps what it finds, unless it is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"


def default(*, is_dry: bool) -> Path:
    """`bench/results/<gpu>`; of a dry run a folder that git ignores."""
    if is_dry:
        return RESULTS.parents[1] / "build" / "gpu-dry"
    command = [sys.executable, "-m", "memaop_triton.bench.machine"]
    try:
        # By another process: this one is not to wait for a driver.
        done = subprocess.run(
            command, cwd=RESULTS.parents[1], capture_output=True, text=True, check=False, timeout=60
        )
    except subprocess.TimeoutExpired:
        return RESULTS / "gpu"
    return RESULTS / (done.stdout.strip() or "gpu")
