"""Starting several processes that form a process group."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT = 300  # seconds; only what hangs takes that long


def torchrun(*command, nproc=2, env=None):
    """Run a script or `-m` module in `nproc` processes to the end, or fail and show its output."""
    with start(torchrun_command(*command, nproc=nproc), env) as process:
        finish(process)


def torchrun_command(*command, nproc=2):
    """The command line that does this."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={nproc}", *map(str, command)]


def start(command, env=None):
    """A process with this one's packages and one thread, the first of a session."""
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)
    return subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    """Wait for the end; fail, and show the output, if it is none of success."""
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        # The launcher's children too, or they would wait for one another forever.
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{process.args}: no end after {TIMEOUT} s\n{output}", pytrace=False)
    if process.returncode:
        pytest.fail(f"{process.args} failed:\n{output}", pytrace=False)
