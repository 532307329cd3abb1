"""In this folder kernels run in Triton's interpreter: no bfloat16, and tf32 is not rounded."""

import pytest
import torch

from memaop_triton.kernels import targets
from tests.traffic import counted, interpreted


@pytest.fixture(autouse=True)
def traffic():
    """Every launch of the test, with the bytes it moved; accesses out of bounds are refused."""
    with interpreted(), counted() as launches:
        yield launches


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory from `torch.empty` holds NaN, so that what was never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tensor_copies(monkeypatch):
    """Launchers choose as for a GPU that copies tiles by descriptor."""
    monkeypatch.setattr(targets, "current", lambda device: targets.TARGETS["sm_90"])


@pytest.fixture(params=[False, True], ids=["pointers", "descriptors"])
def by_descriptor(request):
    """Whether blocks of rows are copied by descriptor."""
    if request.param:
        request.getfixturevalue("tensor_copies")
    return request.param
