"""What was tuned on this machine does not decide what these tests see."""

import pytest

from memaop_triton.kernels.tuning import tuner


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MEMAOP_TRITON_CACHE_DIR", str(tmp_path))
    tuner.forget()
    yield
    tuner.forget()
