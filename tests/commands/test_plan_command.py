"""`memaop-triton plan`: what the command line takes and refuses."""

import json
import sys

import pytest
import torch

from memaop_triton import Sampled, Subspace
from memaop_triton.auto.layer_timing import Measurement, Use
from memaop_triton.commands import cli, loading
from memaop_triton.plan import planning

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

ready = mlp()
number = 3

def batches():
    torch.manual_seed(0)
    for _ in range(3):
        yield torch.randn(64, 8)

def square(output):
    return output.square().mean()

def none():
    return []

def table():
    return {"x": torch.ones(4, 8)}

def token_batches():
    return [{"ids": torch.arange(6).view(2, 3), "mask": torch.ones(2, 3) > 0}] * 2

class WithLoss(Tokens):
    def forward(self, ids, mask):
        logits = super().forward(ids, mask)["logits"]
        return {"loss": logits.square().mean(), "logits": logits}

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
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("plan_models", None)


@pytest.fixture
def measured(monkeypatch):
    """Replaces measuring, and records what is asked for."""
    asked = []

    def measure(*case):
        asked.append(case)
        return Measurement([0.2, 0.2], [0.1, 0.1], 64)

    monkeypatch.setattr(planning, "measure", measure)
    return asked


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


def test_inputs_by_name_and_of_integers_and_a_dtype(models, measured):
    options = ["--input", "ids=3x4:int64:7", "--input", "mask=3x4:bool", "--dtype", "bfloat16"]
    assert cli.run(["plan", "--model", "plan_models:Tokens", "--ratio", "0.5", *options]) == 0
    assert [(use.rows, use.dtype) for use, _, _ in measured] == [(12, torch.bfloat16)]


@pytest.mark.parametrize(
    ("model", "data", "is_known"),
    [
        ("mlp", ["--batches", "plan_models:batches", "--loss", "plan_models:square"], True),
        ("mlp", ["--batches", "plan_models:batches"], False),
        ("WithLoss", ["--batches", "plan_models:token_batches"], True),
        ("WithLoss", ["--input", "ids=3x4:int64:7", "--input", "mask=3x4:bool"], False),
    ],
)
def test_what_auto_would_decide_is_shown_where_there_are_batches_and_a_loss(
    models, capsys, model, data, is_known
):
    """It is the default; random inputs are no batches, whatever the model returns."""
    options = ["--model", f"plan_models:{model}", *data, "--json", "plan.json"]
    assert cli.run(["plan", *options]) == 0
    output, content = capsys.readouterr().out, json.loads((models / "plan.json").read_text())
    assert 'ratio="auto"' in output
    assert ("The noise of sampling is unknown" in output) != is_known
    assert ("give --batches, and --loss" in output) == ("--input" in data)
    assert ("dense is best here" in content["decision"]) == is_known, "so small a layer"
    for layer in content["layers"]:
        assert layer["config"]["ratio"] == "auto"
        assert [option["share"] for option in layer["options"]] == [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16]
        assert all((option["noise"] is not None) == is_known for option in layer["options"])


def test_where_auto_cannot_be_the_default_it_is_an_eighth(models, measured):
    options = ["--model", "plan_models:mlp", "--input", "64x8", "--grad-input", "sampled"]
    assert cli.run(["plan", *options]) == 0
    assert {config.ratio for _, config, _ in measured} == {1 / 8}


def test_times_of_every_share_of_a_shape(capsys):
    assert cli.run(["plan", "--shape", "64x8x4", "--device", "cpu", "--ratio", "auto"]) == 0
    output = capsys.readouterr().out
    assert "1/16" in output
    assert "--batches" not in output


def test_shapes(measured, capsys):
    options = ["--selection", "crs", "--dtype", "float64", "--grad-input", "sampled"]
    options += ["--memory", "none", "--scores", "grad"]
    shapes = ["--shape", "64x8x4", "--shape", "32x8x4"]
    assert cli.run(["plan", *shapes, "--device", "cpu", *options]) == 0
    assert [use for use, _, _ in measured] == [
        Use(m, 8, 4, torch.float64, torch.device("cpu")) for m in (64, 32)
    ]
    config = measured[0][1]
    assert (config.selection, config.grad_input) == ("crs", Sampled())
    assert (config.memory, config.scores) == (None, "grad")
    output = capsys.readouterr().out
    assert "64×8×4" in output
    assert "2 of 2 layers get faster, saving about 200 ms a step and holding 128 B." in output


SHAPE = ["--shape", "8x8x8"]
MLP = ["--model", "plan_models:mlp", "--input"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --model, or at least one --shape"),
        (["--model", "m:f", *SHAPE], "not both"),
        (["--model", "m:f"], "--model is called with --input, or with --batches"),
        ([*MLP, "4x8", "--batches", "plan_models:batches"], "give one of them"),
        ([*SHAPE, "--input", "4x8"], "belong to a --model"),
        ([*SHAPE, "--batches", "plan_models:batches"], "belong to a --model"),
        ([*MLP, "4x8", "--loss", "plan_models:square"], "--loss needs --batches"),
        (
            [*MLP[:2], "--batches", "plan_models:nothing"],
            "returned NoneType, not a list of batches",
        ),
        ([*MLP[:2], "--batches", "plan_models:none"], "returned list, not a list of batches"),
        ([*MLP[:2], "--batches", "plan_models:table"], "returned dict, not a list of batches"),
        ([*MLP[:2], "--batches", "plan_models:number"], "3 is not a callable object"),
        (
            [*MLP[:2], "--batches", "plan_models:batches", "--loss", "plan_models:los"],
            "--loss='plan_models:los': module 'plan_models' has no attribute 'los'",
        ),
        ([*SHAPE, "--ratio", "car"], "neither a number nor 'auto'"),
        ([*SHAPE, "--ratio", "auto", "--selection", "topk", "--memory", "none"], "ratio='auto'"),
        (["--shape", "0x8x8"], "--shape='0x8x8' is not MxNxP"),
        ([*SHAPE, "--ratio", "2"], "--ratio"),
        ([*SHAPE, "--budget", "0"], "--budget"),
        ([*SHAPE, "--device", "toaster"], "--device='toaster' cannot be used"),
        ([*SHAPE, "--memory", "residual"], "memory='residual' with the unbiased"),
        ([*SHAPE, "--memory", "none", "--rank", "4"], "--rank=4 has no meaning"),
        ([*SHAPE, "--selection", "topp"], "Did you mean 'topk'?"),
        ([*SHAPE, "--json", "."], "'.' is a directory"),
        (["--model", "plan_models", "--input", "8"], "is not MODULE:FUNCTION"),
        (["--model", "plan_modells:mlp", "--input", "8"], "No module named 'plan_modells'"),
        (["--model", "plan_models:mpl", "--input", "8"], "'plan_models' has no attribute 'mpl'"),
        (["--model", "plan_models:number", "--input", "8"], "3 is not a callable object"),
        (["--model", "plan_models:with_argument", "--input", "8"], "argument: 'width'"),
        (["--model", "plan_models:nothing", "--input", "8"], "returned NoneType"),
        (["--model", "plan_models:Tokens", "--input", "3:int64:7"], "missing 1 required"),
        ([*MLP, "4x9"], "fails on these inputs: RuntimeError"),
        ([*MLP, "4x-8"], "--input='4x-8' is not [NAME=]"),
        ([*MLP, "4:int64"], "need a bound above 0"),
        ([*MLP, "4:float32:3"], "need a bound above 0"),
        ([*MLP, "4:int8:3"], "'int8' is not one of float16"),
        ([*MLP, "a=4", "--input", "4"], "or none of them"),
        ([*MLP, "a=4", "--input", "a=4"], "name of its own"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(models, measured, capsys, arguments, words):
    assert cli.run(["plan", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_what_can_be_named(models):
    for name in ("nn.Identity", "ready", "mlp"):
        assert isinstance(loading.load_model(f"plan_models:{name}"), torch.nn.Module)
    # What goes wrong in the user's code is raised as it is.
    with pytest.raises(KeyError, match="inside"):
        loading.load_model("plan_models:broken")


def test_values_of_inputs():
    texts = ["50x40", "50x40:int32:3", "100:bool"]
    numbers, tokens, mask = loading.make_inputs(texts, torch.bfloat16, torch.device("cpu"))
    assert numbers.dtype == torch.bfloat16
    assert numbers.float().std() == pytest.approx(1, abs=0.1)
    assert tokens.dtype == torch.int32
    assert set(tokens.flatten().tolist()) == {0, 1, 2}
    assert set(mask.tolist()) == {True, False}
