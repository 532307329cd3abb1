"""Starting several processes that form a process group."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT = 300


def torchrun(script, *args, nproc=2, env=None):
    """Run `script` in `nproc` processes to the end; their output, or a failure that shows it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={nproc}", str(script), *map(str, args)]
    packages = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)
    variables = {"PYTHONPATH": packages, "OMP_NUM_THREADS": "1"} | (env or {})
    with subprocess.Popen(
        command,
        env=os.environ | variables,
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
            pytest.fail(f"no end after {TIMEOUT} s\n{output}", pytrace=False)
    if process.returncode:
        pytest.fail(output, pytrace=False)
    return output
