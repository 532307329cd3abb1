"""`memaop-triton plan`: what the command line takes and refuses."""

import json
import sys

import pytest
import torch

from memaop_triton import Sampled, Subspace
from memaop_triton.commands import cli, loading
from memaop_triton.errors import CommandError
from memaop_triton.plan import planning
from memaop_triton.plan.layer_timing import Measurement

MODELS = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.head = nn.Linear(8, 7)

    def forward(self, ids, mask):
        assert ids.dtype == torch.int64 and mask.dtype == torch.bool and mask.shape == ids.shape
        return {"logits": self.head(self.embed(ids))}

class Factory:
    @staticmethod
    def make():
        return mlp()

ready = mlp()
number = 3

def with_argument(width):
    return mlp()

def nothing():
    return None

def broken():
    raise KeyError("inside")
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A module `plan_models` in the current folder; measuring takes no time."""
    (tmp_path / "plan_models.py").write_text(MODELS)
    (tmp_path / "plan_needs.py").write_text("import a_package_that_is_missing\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("plan_models", "plan_needs"):
        sys.modules.pop(name, None)


@pytest.fixture
def measured(monkeypatch):
    """Replaces measuring, and records what is asked for."""
    asked = []

    def measure(use, config, budget):
        asked.append((use, config, budget))
        return Measurement([0.2, 0.2], [0.1, 0.1], 64)

    monkeypatch.setattr(planning, "measure", measure)
    return asked


def error_of(capsys, *arguments):
    assert cli.run(["plan", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_model_from_the_current_folder(models, measured, capsys):
    options = ["--input", "4x5x8", "--ratio", "0.25", "--rank", "3", "--budget", "6"]
    assert cli.run(["plan", "--model", "plan_models:mlp", *options, "--json", "out/plan.json"]) == 0
    output = capsys.readouterr().out
    for words in ("20×8×16", "20×16×2", "2.00× [2.00, 2.00]", "2 of 2 layers", "wrote out/plan"):
        assert words in output
    assert {(config.ratio, config.memory) for _, config, _ in measured} == {
        (0.25, Subspace(rank=3))
    }
    assert measured[0][2] == pytest.approx(3, rel=0.1)
    content = json.loads((models / "out" / "plan.json").read_text())
    assert [layer["name"] for layer in content["layers"]] == ["0", "2"]


def test_inputs_by_name_and_of_integers(models, measured):
    options = ["--input", "ids=3x4:int64:7", "--input", "mask=3x4:bool"]
    assert cli.run(["plan", "--model", "plan_models:Tokens", *options]) == 0
    assert [use.rows for use, _, _ in measured] == [12]


def test_dtype_of_model_and_inputs(models, measured):
    options = ["--input", "4x8", "--dtype", "bfloat16", "--grad-input", "sampled"]
    assert cli.run(["plan", "--model", "plan_models:mlp", *options]) == 0
    assert {use.dtype for use, _, _ in measured} == {torch.bfloat16}
    assert {config.grad_input for _, config, _ in measured} == {Sampled()}


def test_shapes(measured, capsys):
    options = ["--selection", "topk", "--memory", "residual", "--dtype", "float64"]
    shapes = ["--shape", "64x8x4", "--shape", "32x8x4"]
    assert cli.run(["plan", *shapes, "--device", "cpu", *options]) == 0
    assert [tuple(use[:4]) for use, _, _ in measured] == [
        (64, 8, 4, torch.float64),
        (32, 8, 4, torch.float64),
    ]
    output = capsys.readouterr().out
    assert "64×8×4" in output
    assert "2 of 2 layers get faster, saving about 200 ms a step and holding 128 B." in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --model, or at least one --shape"),
        (["--model", "m:f", "--shape", "1x2x3"], "not both"),
        (["--model", "m:f"], "--model and --input belong together"),
        (["--shape", "1x2x3", "--input", "3"], "--model and --input belong together"),
        (["--shape", "8x8"], "--shape='8x8' is not MxNxP"),
        (["--shape", "0x8x8"], "--shape='0x8x8' is not MxNxP"),
        (["--shape", "8x8x8", "--ratio", "2"], "--ratio"),
        (["--shape", "8x8x8", "--budget", "0"], "--budget"),
        (["--shape", "8x8x8", "--dtype", "int8"], "--dtype"),
        (["--shape", "8x8x8", "--device", "toaster"], "--device='toaster' cannot be used"),
        (["--shape", "8x8x8", "--memory", "residual"], "memory='residual' with the unbiased"),
        (["--shape", "8x8x8", "--memory", "none", "--rank", "4"], "--rank=4 has no meaning"),
        (["--shape", "8x8x8", "--selection", "topp"], "Did you mean 'topk'?"),
        (["--shape", "8x8x8", "--json", "."], "'.' is a directory"),
        (["--model", "plan_models", "--input", "8"], "is not MODULE:FUNCTION"),
        (["--model", "plan_modells:mlp", "--input", "8"], "No module named 'plan_modells'"),
        (
            ["--model", "plan_needs:f", "--input", "8"],
            "No module named 'a_package_that_is_missing'",
        ),
        (["--model", "plan_models:mpl", "--input", "8"], "'plan_models' has no attribute 'mpl'"),
        (["--model", "plan_models:number", "--input", "8"], "3 is not a callable object"),
        (["--model", "plan_models:with_argument", "--input", "8"], "argument: 'width'"),
        (["--model", "plan_models:nothing", "--input", "8"], "returned NoneType"),
        (["--model", "plan_models:mlp", "--input", "4x9"], "fails on these inputs: RuntimeError"),
        (["--model", "plan_models:mlp", "--input", "4x-8"], "--input='4x-8' is not [NAME=]"),
        (["--model", "plan_models:mlp", "--input", "4:int64"], "need a bound above 0"),
        (["--model", "plan_models:mlp", "--input", "4:float32:3"], "need a bound above 0"),
        (["--model", "plan_models:mlp", "--input", "4:int8:3"], "'int8' is not one of float16"),
        (["--model", "plan_models:mlp", "--input", "a=4", "--input", "4"], "or none of them"),
        (["--model", "plan_models:mlp", "--input", "a=4", "--input", "a=4"], "name of its own"),
        (
            ["--model", "plan_models:Tokens", "--input", "3:int64:7"],
            "missing 1 required",
        ),
    ],
)
def test_what_is_wrong_is_told_in_one_line(models, measured, capsys, arguments, words):
    assert words in error_of(capsys, *arguments)


def test_what_goes_wrong_in_the_users_code_is_raised_as_it_is(models):
    with pytest.raises(KeyError, match="inside"):
        loading.load_model("plan_models:broken")


@pytest.mark.parametrize("name", ["Factory.make", "ready", "mlp"])
def test_what_can_be_named(models, name):
    assert isinstance(loading.load_model(f"plan_models:{name}"), torch.nn.Sequential)


def test_values_of_inputs():
    def made(text):
        return loading.make_inputs([text], torch.bfloat16, torch.device("cpu"))[0]

    numbers = made("50x40")
    assert numbers.dtype == torch.bfloat16
    assert numbers.float().std() == pytest.approx(1, abs=0.1)
    tokens = made("50x40:int32:3")
    assert tokens.dtype == torch.int32
    assert set(tokens.flatten().tolist()) == {0, 1, 2}
    assert set(made("100:bool").tolist()) == {True, False}
    with pytest.raises(CommandError):
        made("50,40")
