"""Which implementation a tensor's work goes to."""

import pytest
import torch

from memaop_triton import MemAOPConfig, dispatch, new_memory
from memaop_triton.backward.weight_grad import weight_grad


class OnGpu(torch.Tensor):
    """Says that it lies on a GPU."""

    is_cuda = True


@pytest.fixture
def gpu_rows():
    """Rows of a dtype that claim to be on a GPU."""
    return lambda dtype=torch.float32: torch.ones(8, 4, dtype=dtype).as_subclass(OnGpu)


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def choose(name):
        monkeypatch.setenv("MEMAOP_TRITON_BACKEND", name)

    choose("")
    return choose


def test_by_device(backend, gpu_rows):
    assert not dispatch.runs_triton(torch.ones(8, 4))
    assert dispatch.runs_triton(gpu_rows())
    assert dispatch.runs_triton(gpu_rows(torch.bfloat16))


def test_what_the_kernels_do_not_take_runs_in_pytorch(backend, gpu_rows):
    assert not dispatch.runs_triton(gpu_rows(torch.float64))
    assert not dispatch.runs_triton(gpu_rows(), rank=65)
    assert dispatch.runs_triton(gpu_rows(), rank=64)
    assert not dispatch.runs_triton(gpu_rows(), memory_dtype=torch.float64)
    assert dispatch.runs_triton(gpu_rows(), memory_dtype=torch.bfloat16)


def test_without_triton_everything_runs_in_pytorch(backend, gpu_rows, monkeypatch):
    monkeypatch.setattr(dispatch, "_is_installed", lambda: False)
    assert not dispatch.runs_triton(gpu_rows())


def test_torch_is_forced(backend, gpu_rows):
    backend("torch")
    assert not dispatch.runs_triton(gpu_rows())


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (torch.ones(8, 4), {}, "tensors are on cpu"),
        (torch.ones(8, 4, dtype=torch.float64).as_subclass(OnGpu), {}, "torch.float64"),
        (torch.ones(8, 4).as_subclass(OnGpu), {"rank": 65}, "rank=65"),
    ],
    ids=["cpu", "float64", "rank"],
)
def test_triton_is_forced_or_it_says_why_not(backend, rows, options, said):
    backend("triton")
    with pytest.raises(RuntimeError, match=said):
        dispatch.runs_triton(rows, **options)


def test_a_forced_backend_stops_the_weight_gradient(backend):
    backend("triton")
    config = MemAOPConfig(ratio=1 / 2)
    with pytest.raises(RuntimeError, match="MEMAOP_TRITON_BACKEND='triton'"):
        weight_grad(torch.ones(8, 4), torch.ones(8, 3), config, new_memory(config, 4, 3))


def test_unknown_backend(backend):
    backend("cuda")
    with pytest.raises(ValueError, match="MEMAOP_TRITON_BACKEND='cuda'"):
        dispatch.runs_triton(torch.ones(8, 4))
