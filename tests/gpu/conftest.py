"""Tests on a real GPU, NVIDIA or AMD: `make gpu`, or `pytest -m gpu`.

A test that asks for `device` also runs without a GPU, in Triton's interpreter and on fewer or
smaller problems, so that a mistake in the test itself does not cost the first run on a GPU. The
others need what only a GPU has. None uses configurations that were tuned on this machine.
"""

from collections import Counter
from pathlib import Path

import pytest
import torch

from memaop_triton.kernels.tuning import tuner
from tests.traffic import interpreted

HERE = Path(__file__).parent
CASES_OF_INTERPRETER = 4  # of one test: enough to try the test itself


def pytest_collection_modifyitems(items):
    seen = Counter()
    for item in items:
        if item.path.parent != HERE:
            continue
        item.add_marker("gpu")
        if torch.cuda.is_available():
            continue
        seen[item.function] += 1
        if "device" not in item.fixturenames:
            item.add_marker(pytest.mark.skip("needs a GPU: torch.cuda.is_available() is False"))
        elif seen[item.function] > CASES_OF_INTERPRETER:
            item.add_marker(pytest.mark.skip("without a GPU the first cases run, interpreted"))


@pytest.fixture
def device(monkeypatch):
    """The GPU; without one the CPU, where kernels run in the interpreter."""
    if torch.cuda.is_available():
        yield torch.device("cuda", torch.cuda.current_device())
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("MEMAOP_TRITON_BACKEND", "triton")
    with interpreted():
        yield torch.device("cpu")


@pytest.fixture
def second_device(device):
    """Another GPU than `device`; without one the CPU again."""
    if device.type == "cpu":
        return device
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return torch.device("cuda", (device.index + 1) % torch.cuda.device_count())


@pytest.fixture
def half(device):
    """bfloat16; float32 where the interpreter is, which has no bfloat16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@pytest.fixture
def shape(device):
    """M, N, P of a layer."""
    return (2048, 256, 384) if device.type == "cuda" else (48, 16, 24)


@pytest.fixture
def on_gpu(device):
    """Picks the first of two values on a GPU, the second without one."""
    return lambda there, here: there if device.type == "cuda" else here


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    if torch.cuda.is_available():  # elsewhere the cache only has compiled C code
        monkeypatch.setenv("MEMAOP_TRITON_CACHE_DIR", str(tmp_path))
    tuner.forget()
    yield
    tuner.forget()
