from pathlib import Path

from tests.distributed.launch import torchrun


def test_divided_layers():
    torchrun(Path(__file__).parent / "tensor_parallel_worker.py")
