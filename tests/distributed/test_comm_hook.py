"""FactorAllGather against plain DDP, in three real processes over gloo."""

import importlib.util
import json
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WORKER = HERE / "comm_hook_worker.py"
PROCESSES = 3


def _module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CHECKS = [fn.__name__ for fn in _module(WORKER).CHECKS]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What every process found, by check: all of them in one group, which takes seconds to form."""
    folder = tmp_path_factory.mktemp("comm_hook")
    _module(HERE / "launch.py").torchrun(WORKER, folder, nproc=PROCESSES)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", CHECKS)
def test_factor_all_gather(outcomes, name):
    failures = [f"process {rank}: {o[name]}" for rank, o in enumerate(outcomes) if o[name]]
    assert not failures, "\n".join(failures)
