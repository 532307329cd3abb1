"""How many threads work, and whose GEMM."""

import pytest
import torch

from memaop_triton.kernels.cpu import library, processor


@pytest.fixture(autouse=True)
def _many_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)


@pytest.mark.parametrize("width", [64, 172, 256])
def test_the_layers_of_a_small_transformer_stay_in_one(width):
    """8 × 32 tokens, width 64: its passes and products take less than waking a thread can."""
    for columns in (64, width):
        assert library.sizes_of(torch.empty(256, columns), rank=16) == (256, columns, 1)
    assert library.gemm_threads(256 // 8 + 16, 64, width) == 1


def test_large_ones_take_all():
    assert library.sizes_of(torch.empty(8192, 1024), rank=16)[-1] == 8
    assert library.gemm_threads(1024, 1024, 1024) == 8


def test_more_work_never_takes_fewer():
    counts = [library.sizes_of(torch.empty(1 << power, 64))[-1] for power in range(18)]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == 8


@pytest.mark.parametrize(
    ("capability", "vendor", "dtypes"),
    [
        ("AVX2", "AuthenticAMD", {torch.float32, torch.float64, torch.bfloat16}),
        ("AVX2", "GenuineIntel", {torch.float32, torch.float64, torch.bfloat16}),
        ("AVX512", "AuthenticAMD", {torch.float32, torch.float64}),
        ("AVX512", "GenuineIntel", set()),
        ("AVX512", "", set()),
        ("DEFAULT", "AuthenticAMD", set()),
    ],
)
def test_whose_gemm_multiplies(capability, vendor, dtypes, monkeypatch):
    """Ours where MKL leaves wide registers unused, PyTorch's where it has its own instructions."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(processor, "vendor", lambda: vendor)
    assert {dtype for dtype in library.DTYPES if library.prefers_own_gemm(dtype)} == dtypes
