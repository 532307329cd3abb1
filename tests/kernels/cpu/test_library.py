"""The number of threads, and the choice between the C code's GEMM and PyTorch's."""

import pytest
import torch

from memaop_triton.kernels.cpu import library, processor


def test_small_layers_stay_in_one_thread_and_large_ones_take_all(monkeypatch):
    """8 × 32 tokens of width 64 take less than waking a thread can."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for width in (64, 172, 256):
        assert library.sizes_of(torch.empty(256, width), rank=16) == (256, width, 1)
        assert library.gemm_threads(256 // 8 + 16, 64, width) == 1
    assert library.sizes_of(torch.empty(8192, 1024), rank=16)[-1] == 8
    assert library.gemm_threads(1024, 1024, 1024) == 8
    counts = [library.sizes_of(torch.empty(1 << power, 64))[-1] for power in range(18)]
    assert counts == sorted(counts)


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
