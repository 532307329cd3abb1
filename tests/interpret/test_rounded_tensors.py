"""Whole tensors in 8 bits, by the kernels."""

import pytest
import torch

from memaop_triton.memory.rounded import RoundedTensor
from tests.compiled import needs_compiler


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_equals_what_c_stores(dtype, monkeypatch, traffic):
    a = torch.randn(3, 900, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for backend in ("triton", "torch"):
        monkeypatch.setenv("MEMAOP_TRITON_BACKEND", backend)
        rounded = RoundedTensor(a, torch.Generator().manual_seed(3))
        found.append((rounded.nbytes, rounded.restore(a.shape, a.stride())))
    assert len(traffic) == 2
    (nbytes, ours), (expected_nbytes, expected) = found
    assert nbytes == expected_nbytes == 5 * (512 + 16 + 4) + 140 * a.itemsize + 8
    assert 0 < (ours - a).float().norm() < 0.01 * a.float().norm()
    # A sum that is rounded in another order may lie on the other side of a draw: one step, of 1/40.
    differs = (ours.float() - expected.float()).abs() > 1e-3
    assert differs.float().mean() < 0.03
