"""The checks of this folder's files pass in groups of real processes, over gloo."""

from tests.distributed.launch import succeeds


def run(*files, nproc, folder):
    succeeds("-m", "tests.distributed.checks", *files, nproc=nproc, env={"TMPDIR": str(folder)})


def test_in_two_processes(tmp_path):
    files = "ddp", "fsdp", "conv", "packed", "tensor_parallel", "checkpoint", "auto", "transposed"
    run(*files, nproc=2, folder=tmp_path)


def test_in_three_processes(tmp_path):
    run("comm_hook", nproc=3, folder=tmp_path)


def test_in_four_processes_two_by_two(tmp_path):
    run("grid", "fsdp", nproc=4, folder=tmp_path)
