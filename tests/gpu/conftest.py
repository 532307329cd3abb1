"""These tests do not use configurations that were tuned on this machine."""

from pathlib import Path

import pytest
import torch

from memaop_triton.kernels.tuning import tuner


def pytest_collection_modifyitems(items):
    reason = "needs a GPU: torch.cuda.is_available() is False"
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker("gpu")
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason=reason))


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MEMAOP_TRITON_CACHE_DIR", str(tmp_path))
    tuner.forget()
    yield
    tuner.forget()
