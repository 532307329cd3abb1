import pytest
import torch

from memaop_triton.kernels.cpu import library


@pytest.fixture
def own_gemm(monkeypatch):
    """The GEMM of `gather_gemm.c`, whether it is the faster one on this machine or not."""
    monkeypatch.setattr(library, "prefers_own_gemm", lambda dtype: True)


@pytest.fixture
def plain(monkeypatch):
    """Switches the C code off from the moment it is called."""
    return lambda: monkeypatch.setattr(library, "_library", lambda: None)


@pytest.fixture(params=["C", "PyTorch"])
def way(request, own_gemm, plain):
    """Each way of computing in turn; where nothing is compiled, both are PyTorch's."""
    if request.param == "PyTorch":
        plain()
    return request.param


@pytest.fixture
def threads():
    """Sets their number for the rest of a test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)
