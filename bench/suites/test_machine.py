"""The rates of this machine, by which every other number is judged."""

import pytest
import torch

from memaop_triton.bench import machine

FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# The memory of a step is measured on the GPU if there is one.
ON_CPU, ON_GPU = ((), ("memory",)) if torch.cuda.is_available() else (("memory",), ())


@pytest.mark.parametrize(
    ("device", "dtypes", "size", "stream_bytes"),
    [
        pytest.param(
            "cpu",
            (FLOAT32, FLOAT64),
            2048,
            512 << 20,
            marks=pytest.mark.suite("quick", "cpu", *ON_CPU),
            id="cpu",
        ),
        pytest.param(
            "cuda",
            (BFLOAT16, FLOAT16, FLOAT32),
            8192,
            2 << 30,
            marks=pytest.mark.suite("gpu", *ON_GPU),
            id="gpu",
        ),
        pytest.param("cpu", (FLOAT32,), 64, 1 << 16, marks=pytest.mark.suite("smoke"), id="smoke"),
    ],
)
def test_machine(benchmark, device, dtypes, size, stream_bytes):
    info = machine.describe(
        torch.device(device), dtypes=dtypes, size=size, stream_bytes=stream_bytes
    )
    benchmark.extra_info.update(info, title=info["name"])
    a = torch.randn(64, 64, device=device)
    benchmark.pedantic(lambda: a @ a, rounds=1)
