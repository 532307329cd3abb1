"""Starting several processes that form a process group."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT = 300  # seconds; only what hangs takes that long


def torchrun(script, *args, nproc=2, env=None):
    """Run `script` in `nproc` processes to the end; their output, or a failure that shows it."""
    with subprocess.Popen(
        torchrun_command(script, *args, nproc=nproc),
        env=worker_environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            # The launcher's children too, or they would wait for one another forever.
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            pytest.fail(f"{script}: no end after {TIMEOUT} s\n{output}", pytrace=False)
    if process.returncode:
        pytest.fail(f"{script} failed:\n{output}", pytrace=False)
    return output


def torchrun_command(script, *args, nproc=2):
    """The command line that does this."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={nproc}", str(script), *map(str, args)]


def worker_environment(env=None):
    """The variables of a worker: this process's packages, one thread."""
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | (env or {})
