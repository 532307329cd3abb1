from pathlib import Path

from tests.distributed.launch import torchrun


def test_meshes_of_two_dimensions():
    torchrun(Path(__file__).parent / "grid_worker.py", nproc=4)
