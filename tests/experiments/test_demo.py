"""The demo: what it trains, refuses and writes."""

import functools
import json
import statistics

import numpy as np
import pytest
import torch
from torch import nn

from memaop_triton import MemAOPConfig, auto_freeze, convert_
from memaop_triton.backward.weight_grad import weight_grad
from memaop_triton.commands import cli
from memaop_triton.experiments import data
from memaop_triton.experiments.bert import MiniLm
from memaop_triton.experiments.data import Examples
from memaop_triton.experiments.demo import figure, gradients, mlp, training
from memaop_triton.experiments.demo.training import BLOCK, Result, Scheme, Training
from tests.experiments import tiny_bert

PNG = b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "9"], "--steps has no meaning with --task=mlp: its length is --epochs"),
        (["--tokens", "9"], "--tokens has no meaning with --task=mlp"),
        (["--dataset", "reuters_r8"], "--dataset=reuters_r8 is not for --task=mlp: take digits"),
        (["--task", "finetune", "--epochs", "1"], "its length is --steps"),
        (["--task", "finetune", "--width", "8"], "the pretrained weights have theirs"),
        (["--task", "finetune", "--optimizer", "sgd"], "it is AdamW"),
        (["--task", "finetune", "--dataset", "mnist"], "take newsgroups20 or reuters_r8"),
        (["--task", "finetune", "--batch-size", "33", "--data-dir", "."], "32 training texts"),
        (["--task", "finetune", "--tokens", "2"], "--tokens"),
        (["--task", "gpt"], "--task"),
    ],
)
def test_what_has_no_meaning_is_refused(arguments, words, capsys, tmp_path, monkeypatch):
    tiny_bert.write(tmp_path, 16)
    monkeypatch.chdir(tmp_path)
    assert cli.run(["demo", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_mlp_writes_table_figure_and_numbers(tmp_path, capsys):
    path = tmp_path / "sub" / "demo.json"
    size = ["--seeds", "2", "--epochs", "2", "--width", "32", "--batch-size", "128"]
    files = ["--output", str(tmp_path), "--json", str(path)]
    assert cli.run(["demo", *size, "--ratio", "0.25", *files]) == 0
    output, content = capsys.readouterr().out, json.loads(path.read_text())
    labels = [scheme.label for scheme in mlp.schemes(0.25)]
    assert all(label in output for label in labels)
    assert "…" not in output  # 80 columns are enough for the table
    assert (tmp_path / "demo_digits_sgd.png").read_bytes().startswith(PNG)
    assert content["settings"]["width"] == 32
    assert content["settings"]["lr"] == mlp.LEARNING_RATES["sgd"]
    found = {scheme["key"]: scheme for scheme in content["schemes"]}
    assert list(found) == ["dense", "auto", "default", "paper"]
    steps = 2 * 1437 // 128
    for key, scheme in found.items():
        assert len(scheme["accuracies"]) == len(scheme["losses"]) == len(scheme["curves"]) == 2
        assert scheme["seconds"] >= steps * 0.5 * scheme["step_seconds"] > 0
        assert scheme["seconds"] * scheme["speed"] == pytest.approx(found["dense"]["seconds"])
        assert scheme["weight_grad_seconds"] > 0
        assert (scheme["weight_grad_flops"] == 1) == (key in ("dense", "auto"))
        # 22 steps are two blocks: three evaluations.
        assert scheme["curves"][0]["steps"] == [0, 11, steps]
        assert len(scheme["seconds_at_evaluations"]) == 3
        assert len(scheme["decisions"]) == (2 if key == "auto" else 0)
    for seed, line in enumerate(found["auto"]["decisions"]):
        assert f"auto, seed {seed}: {line}" in " ".join(output.split())
    assert found["dense"]["memory_bytes"] == 0
    assert found["default"]["memory_bytes"] == 4 * 8 * ((64 + 32) + 2 * (32 + 32))
    # A float32 row of x and g and a flag for each of the 128 rows of the three hidden layers.
    assert found["paper"]["memory_bytes"] == 128 * (4 * (64 + 32 + 4 * 32) + 3)


def test_finetune_writes_table_figure_and_numbers(tmp_path, capsys, monkeypatch):
    tiny_bert.write(tmp_path, 16)
    tiny = functools.partial(MiniLm, **tiny_bert.SIZES)
    monkeypatch.setattr("memaop_triton.experiments.bert.MiniLm", tiny)
    path = tmp_path / "demo.json"
    size = ["--steps", "16", "--batch-size", "16", "--tokens", "8", "--lr", "0.01"]
    files = ["--output", str(tmp_path), "--json", str(path), "--data-dir", str(tmp_path)]
    assert cli.run(["demo", "--task", "finetune", *size, *files]) == 0
    output, content = capsys.readouterr().out, json.loads(path.read_text())
    assert "16 texts × 8 tokens" in output
    assert "…" not in output
    assert (tmp_path / "demo_finetune_newsgroups20.png").read_bytes().startswith(PNG)
    assert content["settings"]["task"] == "finetune"
    assert content["settings"]["ratio"] == 0.25
    assert content["tested"] == 32
    dense, auto, default = content["schemes"]
    assert [one["key"] for one in (dense, auto, default)] == ["dense", "auto", "default"]
    assert dense["curves"][0]["steps"] == [0, 8, 16]
    first = dense["curves"][0]
    assert first["loss"][-1] < 0.7 * first["loss"][0]
    assert default["weight_grad_flops"] < 1
    assert auto["decisions"]
    for one in (auto, default):
        assert one["curves"][0]["loss"][0] == pytest.approx(first["loss"][0])


def test_mlp_does_not_swing(tmp_path, monkeypatch):
    # The defaults' rate, batches, length and seeds, on a narrower network for the sake of time.
    pair = mlp.schemes(0.125)[::2]
    assert [scheme.key for scheme in pair] == ["dense", "default"]
    monkeypatch.setattr(mlp, "schemes", lambda ratio: pair)
    path = tmp_path / "demo.json"
    files = ["--output", str(tmp_path), "--json", str(path)]
    assert cli.run(["demo", "--width", "256", *files]) == 0
    for scheme in json.loads(path.read_text())["schemes"]:
        accuracy = np.array([curve["accuracy"] for curve in scheme["curves"]])
        # Rates and weights that let the network swing gave falls of 0.4 to 0.6.
        assert (np.maximum.accumulate(accuracy, axis=1) - accuracy).max() < 0.15
        assert (accuracy[:, -1] > 0.9).all()
        assert len(accuracy) == mlp.Settings().seeds


def test_schemes_are_paired_and_runs_repeat():
    images = data.load_images("digits")
    settings = mlp.Settings(ratio=1, seeds=1, epochs=2, batch_size=256, width=16)
    first, again = (training.run(mlp.training(settings, images)) for _ in range(2))
    for result, other in zip(first, again, strict=True):
        assert result.losses == other.losses
        # With every row computed all schemes are dense from the same start on the same batches.
        assert result.losses[0] == pytest.approx(first[0].losses[0], rel=1e-4)


def recorded(steps, evaluations=20, is_decaying=True):
    """A training of dense and "auto", and (network, batch, learning rate) of its steps in turn."""
    log = []

    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.head = nn.Linear(1, 4), nn.Linear(4, 2)

        def forward(self, x):
            if torch.is_grad_enabled():
                log.append((type(self.hidden).__name__, x[:, 0].tolist()))
            return self.head(self.hidden(x))

    rates = []

    class Optimizer(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    x, y = torch.arange(6.0).unsqueeze(1), torch.tensor([0, 1] * 3)
    schemes = [Scheme("dense", "dense", None), Scheme("auto", "a", MemAOPConfig(ratio="auto"))]
    make = functools.partial(Optimizer, lr=0.5)
    plan = Training(
        name="tiny",
        title="tiny",
        network="tiny",
        settings={},
        schemes=schemes,
        data=Examples(x, y, x, y),
        batch_size=4,
        steps=steps,
        seeds=1,
        evaluations=evaluations,
        build=Recorder,
        optimizer=make,
        is_decaying=is_decaying,
    )
    return plan, log, rates


def test_schemes_take_blocks_of_steps_in_turn():
    plan, log, rates = recorded(40)
    seen = []
    training.run(plan, lambda *one: seen.append(one[:2]))
    log = log[: 2 * 40]  # the rest times the weight gradients
    assert plan.ends() == [8, 16, 24, 32, 40]
    assert seen == [(key, end) for end in plan.ends() for key in ("dense", "auto")]
    batches = {}
    for start in range(0, len(log), BLOCK):
        names = {name for name, _ in log[start : start + BLOCK]}
        assert len(names) == 1
        batches.setdefault(names.pop(), []).extend(rows for _, rows in log[start : start + BLOCK])
    dense, auto = batches.values()
    assert dense == auto
    first_passes = [row for rows in dense[:3] for row in rows]
    assert sorted(first_passes) == sorted([*range(6)] * 2)
    order = [name for name, _ in log[::BLOCK]]
    assert order != order[:2] * 5
    assert sorted(rates) == pytest.approx(sorted([0.5 * (1 - s / 40) for s in range(40)] * 2))


@pytest.mark.parametrize(
    ("steps", "evaluations", "ends"),
    [(1, 20, [1]), (15, 20, [15]), (17, 20, [8, 17]), (100, 3, [33, 67, 100])],
)
def test_blocks_are_long_enough(steps, evaluations, ends):
    assert recorded(steps, evaluations)[0].ends() == ends


def test_a_constant_rate_stays():
    plan, _, rates = recorded(3, is_decaying=False)
    training.run(plan)
    assert set(rates) == {0.5}


def test_seconds_are_of_all_steps_before_an_evaluation():
    result = Result(Scheme("auto", "auto", None), [0, 1, 3])
    result.step_seconds = [[1.0, 2.0, 4.0], [3.0, 2.0, 0.0]]
    assert result.seconds_at_evaluations() == [0, 2, 6]
    assert result.seconds == 6
    assert result.step_median == statistics.median([1, 2, 4, 3, 2, 0])


def test_costs_are_those_of_what_was_decided(monkeypatch):
    ratios = set()

    def spied(x, g, config, memory):
        ratios.add(config.ratio)
        return weight_grad(x, g, config, memory)

    monkeypatch.setattr(gradients, "weight_grad", spied)
    x, y = torch.randn(256, 128), torch.randint(10, (256,))
    models = [mlp.build_model(128, 128) for _ in range(3)]
    for model, ratio in zip(models[1:], ("auto", 0.25), strict=True):
        config = MemAOPConfig(ratio=ratio, memory="none")
        convert_(model, config, overrides={"head": None})
    controller = models[1][0].layer_state.controller
    names = list(controller.shares)
    controller.phase = "sampling"
    controller.shares = dict.fromkeys(names, 1.0) | {names[2]: 0.25}
    auto_freeze(models[1])
    dense, decided, sampled = gradients.costs_of(models, x, y)
    assert ratios == {0.25}  # exact layers are timed as they are computed, by a plain GEMM
    assert dense.flops == 1
    # Of three layers of one size one is sampled, or all are.
    assert 1 - decided.flops == pytest.approx((1 - sampled.flops) / 3)
    assert 0.25 < sampled.flops < 0.5
    for one in (dense, decided, sampled):
        assert one.seconds > 0
        assert one.memory_bytes == 0


def test_the_figure_shows_seconds_that_were_taken(monkeypatch):
    plan, _, _ = recorded(16)
    results = training.run(plan)
    kept = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **_: kept.append(self))
    figure.save("unused.png", results, plan)
    by_step, by_second, _, accuracy = kept[0].axes
    assert [text.get_text() for text in kept[0].legends[0].get_texts()] == [
        "dense",
        "a: 100 % of dW's FLOPs in the end",
    ]
    for result, line in zip(results, by_second.get_lines(), strict=True):
        assert line.get_xdata().tolist() == result.seconds_at_evaluations()
        assert line.get_ydata().tolist() == result.losses[0]
    for result, line in zip(results, accuracy.get_lines(), strict=True):
        assert line.get_ydata().tolist() == [100 * value for value in result.accuracies[0]]
    assert all(line.get_xdata().tolist() == [0, 8, 16] for line in by_step.get_lines())
