"""Every example runs, for a few steps, and prints dense beside ours."""

import gzip
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.distributed import run_example
from tests.distributed.launch import launch
from tests.distributed.resume_worker import differences

FOLDER = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
NEEDS = {
    "accelerate_loop": ("accelerate",),
    "hf_trainer": ("transformers", "accelerate"),
    "lightning_trainer": ("lightning",),
    "lora": ("peft",),
}
LONG = {
    "accelerate_loop",
    "char_gpt",
    "hf_trainer",
    "lightning_trainer",
}  # two or three seconds, much of it imports
IN_PROCESSES = {"ddp_torchrun", "fsdp_torchrun"}
TABLE = re.compile(
    r"^ +loss +ms a step.*\ndense +(\S+) +\S+.*\nconverted +(\S+) +\S+.*\nsaved: ", re.MULTILINE
)


def check_table(printed):
    losses = [float(loss) for loss in TABLE.search(printed).groups()]
    assert all(0 < loss < 10 for loss in losses), printed
    # After so few steps from the same weights.
    assert losses[1] == pytest.approx(losses[0], rel=0.2), printed


pytestmark = [
    # What PEFT and Lightning call of transformers and PyTorch, and that one process reads.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, Leaf.* is deprecated:FutureWarning"),
]


@pytest.fixture
def run(monkeypatch, capsys):
    """What an example prints, in this process, on data that need no files."""

    def call(name, *arguments, data=""):
        monkeypatch.setenv("MEMAOP_TRITON_DATA_DIR", data)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        monkeypatch.syspath_prepend(str(FOLDER))
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in LONG else [])
        for name in sorted(set(NAMES) - IN_PROCESSES - {"side_by_side"})
    ],
)
def test_a_few_steps(name, run):
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module, reason=f"needs {module}, which is not installed")
    check_table(run(name, "--steps", "2"))


@pytest.mark.slow  # two processes
@pytest.mark.parametrize("name", sorted(IN_PROCESSES))
def test_a_few_steps_in_two_processes(name):
    check_table(in_two_processes(name, "--steps", "3"))


@pytest.mark.slow  # three times two processes
def test_fully_sharded_training_goes_on_from_its_checkpoint_bit_for_bit(tmp_path):
    in_two_processes("fsdp_torchrun", "--steps", "8", "--checkpoint", tmp_path / "whole")
    for steps in ("4", "8"):
        in_two_processes("fsdp_torchrun", "--steps", steps, "--checkpoint", tmp_path / "parts")
    whole, parts = (contents(tmp_path / name) for name in ("whole", "parts"))
    assert any("memaop_memory" in name for name in whole)
    assert differences(whole, parts) == []


def in_two_processes(name, *arguments):
    example = FOLDER / f"{name}.py"
    status, printed = launch(run_example.__file__, example, *arguments, nproc=2, env=NO_DATA)
    assert status == 0, printed
    return printed


NO_DATA = {"MEMAOP_TRITON_DATA_DIR": ""}


def contents(folder):
    """Everything in a distributed checkpoint, by name."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {}
    for name, entry in metadata.items():
        is_tensor = hasattr(entry, "size")
        state[name] = torch.empty(entry.size, dtype=entry.properties.dtype) if is_tensor else ""
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


@pytest.mark.slow  # reads a pretrained network
def test_fine_tuning_a_pretrained_network(run, tmp_path):
    folder = Path(os.environ.get("MEMAOP_TRITON_DATA_DIR", ""))
    if not (folder / "minilm").is_dir():
        pytest.skip("needs the pretrained MiniLM in MEMAOP_TRITON_DATA_DIR")
    (tmp_path / "minilm").symlink_to(folder / "minilm")
    for part in ("train", "test"):  # not all of it, which takes long to read
        file = f"newsgroups20_{part}.tsv.gz"
        lines = gzip.decompress((folder / file).read_bytes()).splitlines(keepends=True)
        (tmp_path / file).write_bytes(gzip.compress(b"".join(lines[::40])))
    check_table(run("finetune_bert", "--steps", "2", data=str(tmp_path)))


def test_examples_are_short_and_listed():
    table = (FOLDER / "README.md").read_text()
    for name in NAMES:
        lines = (FOLDER / f"{name}.py").read_text().splitlines()
        assert len(lines) < 80, name
        assert f"[{name}.py]({name}.py)" in table, name
