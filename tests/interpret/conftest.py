"""In this folder kernels run in Triton's interpreter: no bfloat16, and tf32 is not rounded."""

import pytest

from tests.traffic import counted, interpreted


@pytest.fixture(autouse=True)
def traffic():
    """Every launch of the test, with the bytes it moved; accesses out of bounds are refused."""
    with interpreted(), counted() as launches:
        yield launches
