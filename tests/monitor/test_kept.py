"""What reports say of the bytes that layers with a stash keep of their inputs."""

import copy

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from memaop_triton import MemAOPConfig, convert_, model_report, monitor
from memaop_triton.memory.stash import Stash
from memaop_triton.monitor.kept import KeptBytes, kept_bytes
from memaop_triton.nn.layer_choice import converted_layers

ROWS, SIZE = 256, 128
INT4 = MemAOPConfig(ratio=1 / 8, memory="none", stash="int4")
DENSE = ROWS * SIZE * 4
BITS = Stash.of(torch.zeros(ROWS, SIZE), 4).nbytes


class Block(nn.Module):
    """Two layers that share their inputs, one after a ReLU, and one without a stash."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.after, self.exact = (nn.Linear(SIZE, SIZE) for _ in range(4))

    def forward(self, x):
        x = x + 1
        return self.exact(self.after(F.relu(self.left(x) + self.right(x))) * 1)


@pytest.fixture
def block():
    overrides = {"exact": MemAOPConfig(ratio=1 / 8, memory="none")}
    return convert_(Block(), INT4, overrides=overrides)


def read(model):
    return kept_bytes({name: layer.layer_state for name, layer in converted_layers(model)})


def test_bytes_are_those_of_inputs_and_of_what_is_kept(block):
    assert read(block) == {"left": None, "right": None, "after": None}
    for _ in range(2):
        block(torch.randn(ROWS, SIZE)).sum().backward()
        assert read(block) == {
            "left": KeptBytes(DENSE, BITS),
            "right": KeptBytes(0, 0, "shared with left"),
            "after": KeptBytes(DENSE, DENSE, "for Relu anyway"),
        }
    assert copy.deepcopy(block).left.layer_state.kept is None


def test_the_inputs_of_every_step_count(block):
    x = torch.randn(ROWS, SIZE)
    for _ in range(2):
        block.left(x).sum().backward()
        assert read(block)["left"] == KeptBytes(DENSE, BITS)


def test_layers_that_share_inputs_and_not_a_stash(block):
    convert_(other := Block(), MemAOPConfig(ratio=1 / 8, memory="none", stash="int8"))
    x = torch.randn(ROWS, SIZE)
    y = block.left(x) + other.right(x)
    states = {"a": block.left.layer_state, "b": other.right.layer_state}
    assert kept_bytes(states) == {
        "a": KeptBytes(DENSE, BITS),
        "b": KeptBytes(0, BITS + ROWS * SIZE // 2),
    }
    y.sum().backward()


def test_what_autocast_made_for_each_layer_counts_for_each(block):
    with torch.autocast("cpu", torch.bfloat16):
        y = block(torch.randn(ROWS, SIZE, requires_grad=True))
    assert read(block)["left"] == KeptBytes(DENSE // 2, BITS)
    assert read(block)["right"] == KeptBytes(DENSE // 2, 0, "shared with left")
    y.sum().backward()


def test_a_leaf_is_kept_for_itself(block):
    block.left(nn.Parameter(torch.randn(ROWS, SIZE)))
    assert read(block)["left"] == KeptBytes(DENSE, DENSE, "for a leaf anyway")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_layer_records_what_it_keeps(block):
    layer = torch.compile(block.left, backend="aot_eager")
    layer(torch.randn(ROWS, SIZE)).sum().backward()
    assert read(block)["left"] == KeptBytes(DENSE, BITS)


def test_the_report_without_layers_that_decide_is_the_table_of_bytes(block):
    block(torch.randn(ROWS, SIZE)).sum().backward()
    lines = [line.split("  ", 1) for line in model_report(block).splitlines()[:-1]]
    assert [(name.strip(), text.strip()) for name, text in lines] == [
        ("layer", "kept, MiB (dense)"),
        ("left", "0.0176 (0.125)"),
        ("right", "0 (0), shared with left"),
        ("after", "0.125 (0.125), for Relu anyway"),
        ("sum", "0.143 (0.25)"),
    ]


def test_the_report_has_both_tables():
    model = convert_(Block(), MemAOPConfig(ratio="auto", memory="none", stash="int4"))
    lines = model_report(model).splitlines()
    assert lines[0].startswith("exact: a training is left alone")
    assert [line.split() for line in lines[-4:-1]] == (
        [["after", "–"], ["exact", "–"], ["sum", "0", "(0)"]]
    )


def test_without_a_stash_nothing_is_said_about_bytes():
    plain = convert_(nn.Linear(SIZE, SIZE), MemAOPConfig(ratio=1 / 8))
    with pytest.raises(ValueError, match="None has a stash either"):
        model_report(plain)
    model = convert_(Block(), MemAOPConfig(ratio="auto", memory="none"))
    assert "kept" not in model_report(model)
    assert "kept" not in table_of(plain)


def table_of(model):
    console = Console(width=200)
    with monitor(model, every=1, starving=1e9) as watch, console.capture() as printed:
        model(torch.randn(ROWS, SIZE)).sum().backward()
        console.print(watch.table())
    return printed.get()


def test_the_table_of_a_monitor_has_a_column(block):
    heading, _, *rows = table_of(block).strip().splitlines()
    assert heading.rstrip().endswith("kept, MiB (dense)")
    cells = {row.split()[0]: row.rstrip() for row in rows if row.strip()}
    assert cells["left"].endswith("0.0176 (0.125)")
    assert cells["right"].endswith("0 (0), shared with left")
    assert cells["after"].endswith("0.125 (0.125), for Relu anyway")
    assert cells["exact"].endswith("–")
