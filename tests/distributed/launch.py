"""Starts a script in several processes, as a user does."""

import os
import subprocess
import sys
from pathlib import Path

TIMEOUT = 240  # seconds; only what hangs takes that long
ROOT = Path(__file__).parents[2]


def torchrun(script, *args, nproc=2, env=None):
    """Run `script` in `nproc` processes of one group, on a free port; its output.

    Args:
        script: Path of a Python file.
        args: Passed on to it, as strings.
        nproc: Number of processes.
        env: Environment variables beside the present ones.

    Raises:
        AssertionError: A process failed or nothing ended in time; shows what they printed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(nproc), str(script), *map(str, args)]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    settings = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        **(env or {}),
    }
    # A session of its own: what hangs is ended with all of its processes.
    process = subprocess.Popen(
        command,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        raise AssertionError(f"{script} did not end in {TIMEOUT} s:\n{output}") from None
    assert process.returncode == 0, f"{script} failed:\n{output}"
    return output
