"""Runs an example by torchrun: `run_example.py FILE ARGUMENT...`.

Ends the process without the interpreter's teardown, which gloo's threads do not always survive
(`checks.leave`).
"""

import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
