"""`python -m bench.first_run --results DIR`: all stages; with `--stage`, the cases of one."""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import signal
import sys
from pathlib import Path


def main() -> int:
    """Run what the command line says; an exit status."""
    parser = argparse.ArgumentParser(prog="bench.first_run", description=__doc__)
    parser.add_argument("--results", type=Path, help="default: bench/results/<gpu>")
    parser.add_argument("--dry", action="store_true", help="on the CPU, interpreted, small shapes")
    of_worker = parser.add_argument_group("what the processes of a stage are started with")
    of_worker.add_argument("--stage")
    of_worker.add_argument("--share", default="0/1", help="its number / the number of processes")
    of_worker.add_argument("--limit", type=float, default=0, help="seconds until it is ended")
    given = parser.parse_args()
    if given.stage is None:
        from memaop_triton.bench.first_run import folders, running

        folder = (given.results or folders.default(is_dry=given.dry)).resolve()
        return running.run(folder, is_dry=given.dry)
    # Where it was when it was ended is the last thing in its log.
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGTERM, chain=True)
    return _cases(given)


def _cases(given: argparse.Namespace) -> int:
    import torch

    from memaop_triton.bench.first_run import dry
    from memaop_triton.bench.first_run.cases import Place

    worker, workers = map(int, given.share.split("/"))
    place = Place(
        folder=given.results,
        stage=given.stage,
        device=torch.device("cpu" if given.dry else "cuda:0"),
        is_dry=given.dry,
        worker=worker,
        workers=workers,
    )
    name = given.stage.replace(" ", "_")
    module = importlib.import_module(f"memaop_triton.bench.first_run.{name}")
    with dry.interpreter(given.dry):
        status: int = module.run(place)
    return status


if __name__ == "__main__":
    sys.exit(main())
