from pathlib import Path

from tests.distributed.launch import torchrun


def test_fully_sharded_models():
    torchrun(Path(__file__).parent / "fsdp_worker.py")
