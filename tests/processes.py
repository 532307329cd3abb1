"""Commands in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*command, cwd=ROOT, **variables):
    """What a command prints; it must not fail. `variables` join the environment."""
    environ = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    command = [str(part) for part in command]
    done = subprocess.run(command, cwd=cwd, env=environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def run_python(code, **options):
    """What a Python of this environment prints that finds the checkout."""
    return run(sys.executable, "-c", code, **{"PYTHONPATH": str(ROOT), **options})
