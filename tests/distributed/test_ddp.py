from pathlib import Path

from tests.distributed.launch import torchrun


def test_data_parallel_models():
    torchrun(Path(__file__).parent / "ddp_worker.py")
