"""Starting a process, or several that form a process group."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT = 300  # seconds; only what hangs takes that long


def launch(*command, nproc=1, env=None):
    """Run a script or `-m` module in `nproc` processes to the end: exit status and output."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)
    process = subprocess.Popen(
        [sys.executable, *(torchrun if nproc > 1 else []), *map(str, command)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        # The launcher's children too, or they would wait for one another forever.
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{process.args}: no end after {TIMEOUT} s\n{output}", pytrace=False)
    return process.returncode, output


def succeeds(*command, **options):
    """Fail, and show the output, if it fails."""
    status, output = launch(*command, **options)
    if status:
        pytest.fail(f"{command} failed:\n{output}", pytrace=False)
