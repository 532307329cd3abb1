"""Starting several processes that form a process group."""

import os
import subprocess
import sys
from pathlib import Path

TIMEOUT = 300


def torchrun(script, *args, nproc=2, env=None):
    """Run `script` in `nproc` processes to the end; their output, or a failure that shows it."""
    result = subprocess.run(
        torchrun_command(script, *args, nproc=nproc),
        env=worker_environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def torchrun_command(script, *args, nproc=2):
    """The command line that does this."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={nproc}", str(script), *map(str, args)]


def worker_environment(env=None):
    """The variables of a worker: this process's packages, one thread."""
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | (env or {})
