"""Which implementation a tensor's work goes to."""

import pytest
import torch

from memaop_triton import MemAOPConfig, MemAOPLinear, dispatch, new_memory
from memaop_triton.backward.weight_grad import weight_grad


class OnGpu(torch.Tensor):
    """Says that it lies on a GPU."""

    is_cuda = True


CPU = torch.ones(8, 4)
GPU = CPU.as_subclass(OnGpu)
GPU_DOUBLE = CPU.double().as_subclass(OnGpu)


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def choose(name):
        monkeypatch.setenv("MEMAOP_TRITON_BACKEND", name)

    choose("")
    return choose


@pytest.mark.parametrize(
    ("choice", "rows", "options", "expected"),
    [
        ("", CPU, {}, False),
        ("", GPU, {}, True),
        ("", CPU.bfloat16().as_subclass(OnGpu), {}, True),
        ("", GPU_DOUBLE, {}, False),
        ("", GPU, {"rank": 64}, True),
        ("", GPU, {"rank": 65}, False),
        ("", GPU, {"memory_dtype": torch.bfloat16}, True),
        ("", GPU, {"memory_dtype": torch.float64}, False),
        ("torch", GPU, {}, False),
        ("triton", GPU, {}, True),
        ("triton", CPU, {}, "MEMAOP_TRITON_BACKEND='triton'.*tensors are on cpu"),
        ("triton", GPU_DOUBLE, {}, "torch.float64"),
        ("triton", GPU, {"rank": 65}, "rank=65"),
    ],
)
def test_what_runs_in_triton(backend, choice, rows, options, expected):
    backend(choice)
    if isinstance(expected, bool):
        assert dispatch.runs_triton(rows, **options) == expected
    else:
        with pytest.raises(RuntimeError, match=expected):
            dispatch.runs_triton(rows, **options)


def test_without_triton_everything_runs_in_pytorch(backend, monkeypatch):
    monkeypatch.setattr(dispatch, "_is_installed", lambda: False)
    assert not dispatch.runs_triton(GPU)


def test_a_forced_backend_stops_the_weight_gradient(backend):
    backend("triton")
    config = MemAOPConfig(ratio=1 / 2)
    with pytest.raises(RuntimeError, match="MEMAOP_TRITON_BACKEND='triton'"):
        weight_grad(CPU, torch.ones(8, 3), config, new_memory(config, 4, 3))


@pytest.mark.parametrize(
    ("interpreted", "dtype", "reason"),
    [
        ("1", torch.float64, "there are no kernels for torch.float64"),
        ("0", torch.float32, "on cpu"),
    ],
)
def test_a_forced_backend_stops_the_projected_input_gradient(
    backend, monkeypatch, interpreted, dtype, reason
):
    backend("triton")
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    layer = MemAOPLinear(32, 32, config=MemAOPConfig(grad_input="projected"), dtype=dtype)
    layer.requires_grad_(False)  # nothing but dX, whose basis is refreshed in the first step
    x = torch.ones(64, 32, dtype=dtype, requires_grad=True)
    y = layer(x)
    with pytest.raises(RuntimeError, match=f"MEMAOP_TRITON_BACKEND='triton' .*{reason}"):
        y.sum().backward()
    assert x.grad is None


def test_unknown_backend(backend):
    backend("cuda")
    with pytest.raises(ValueError, match="MEMAOP_TRITON_BACKEND='cuda'"):
        dispatch.runs_triton(CPU)
