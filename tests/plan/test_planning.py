"""Which layers are worth converting: observations, measurements and verdicts."""

import json
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memaop_triton import MemAOPConfig, plan
from memaop_triton.auto import timing
from memaop_triton.auto.layer_timing import Use
from memaop_triton.plan import planning
from memaop_triton.plan.observing import observe
from memaop_triton.plan.result import Verdict

CPU = torch.device("cpu")
X = torch.ones(3, 4)
FIXED = MemAOPConfig()


class Net(nn.Module):
    """A layer without gradients, one that is used twice, a frozen one, and one without use."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 6)
        self.first = nn.Linear(6, 8)
        self.twice = nn.Linear(8, 8, bias=False)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.unused = nn.Linear(8, 2)

    def forward(self, x):
        with torch.no_grad():
            x = self.encoder(x)
        return self.frozen(self.twice(self.twice(self.first(x)).relu_()[:3]))


def net(forward, **layers):
    """A model of these layers, by name, whose forward pass is a function of it and the inputs."""
    model = nn.ModuleDict(layers)
    model.forward = lambda *args, **kwargs: forward(model, *args, **kwargs)
    return model


def uses_of(model, inputs):
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return observe(model, layers, inputs)[0]


def verdicts(found):
    return {row.name: row.verdict.value for row in found.layers}


# What is seen


def test_every_use_of_a_layer_is_seen_with_what_it_has_to_compute():
    uses = uses_of(Net(), torch.randn(2, 5, 6))
    assert uses == {
        "encoder": Counter(),
        "first": Counter([Use(10, 6, 8, torch.float32, CPU, True, True, False)]),
        "twice": Counter([Use(10, 8, 8, torch.float32, CPU, True, False, True)] * 2),
        "frozen": Counter([Use(10, 8, 8, torch.float32, CPU, False, False, True)]),
        "unused": Counter(),
    }


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_layers_count_once(use_reentrant):
    def block(model, x):
        return checkpoint(model["inside"], model["before"](x), use_reentrant=use_reentrant)

    model = net(block, before=nn.Linear(4, 4), inside=nn.Linear(4, 4))
    uses = uses_of(model, X)
    assert {name: counted.total() for name, counted in uses.items()} == {"before": 1, "inside": 1}


def test_rows_are_seen_in_the_dtype_of_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        (use,) = uses_of(nn.Linear(4, 4), X)[""]
    assert use.dtype == torch.bfloat16


def test_a_compiled_model_is_seen_without_compiling_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    compiled = torch.compile(model, backend=lambda *_: pytest.fail("compiled"))
    layers = {"0": model[0]}
    assert observe(compiled, layers, X)[0]["0"].total() == 1


@dataclass
class Output:
    logits: torch.Tensor
    name: str = "output"


def test_outputs_of_any_structure():
    def nested(model, x):
        y = model["layer"](x)
        return [None, y.detach(), {"steps": torch.tensor(3), "deep": (1, Output(y.double()))}]

    assert uses_of(net(nested, layer=nn.Linear(4, 4)), X)["layer"].total() == 1


@pytest.mark.parametrize("inputs", [{"a": 3, "b": torch.ones(4, 4)}, (3, torch.ones(4, 4))])
def test_inputs_by_name_and_in_order(inputs):
    def two(model, a, b):
        assert (a, b.shape[0]) == (3, 4)
        return model["layer"](b)

    assert uses_of(net(two, layer=nn.Linear(4, 2)), inputs)["layer"].total() == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"example_inputs": None}, TypeError, "example_inputs must be a tensor.*got NoneType"),
        ({"example_inputs": 3}, TypeError, "example_inputs must be a tensor.*got int"),
        (
            {"model": nn.Linear(4, 2).requires_grad_(False)},
            ValueError,
            "no floating-point tensor that requires a gradient in the model's output, a Tensor",
        ),
        ({"loss_fn": lambda y: y}, ValueError, "loss_fn must return a tensor"),
        ({"loss_fn": lambda y: 3.0}, ValueError, "loss_fn must.*got 3.0"),
        (
            {"model": nn.Sequential(nn.Linear(4, 2), nn.LazyBatchNorm1d())},
            ValueError,
            "not initialised",
        ),
        (
            {"model": nn.Linear(4, 2).to("meta"), "example_inputs": X.to("meta")},
            ValueError,
            "layer the model itself works on device 'meta'",
        ),
        ({"time_budget": 0}, ValueError, "time_budget=0"),
        ({"time_budget": float("nan")}, ValueError, "time_budget=nan"),
    ],
)
def test_what_cannot_be_planned(arguments, error, message):
    with pytest.raises(error, match=message):
        plan(**{"model": nn.Linear(4, 2), "example_inputs": X} | arguments)


def test_a_divided_weight_and_a_shape_without_rows_cannot_be_planned():
    model = nn.Linear(4, 2)
    model.weight.device_mesh = "as a DTensor has"
    with pytest.raises(ValueError, match="layer the model itself: its weight is a DTensor"):
        plan(model, example_inputs=X)
    with pytest.raises(ValueError, match="shape 9x0x4"):
        planning.plan_shapes([(9, 0, 4)])


# What is measured


def test_equal_layers_share_a_measurement_and_the_budget_is_divided(measured):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 2))
    plan(model, FIXED, example_inputs=torch.randn(9, 8), time_budget=30.0)
    seen = [(use.needs_input, use.out_features) for use, _, _ in measured.asked]
    assert seen == [(False, 8), (True, 8), (True, 2)]
    assert measured.asked[0][2] == pytest.approx(10.0, rel=0.1)


def test_each_layer_is_measured_with_its_configuration(measured):
    other = MemAOPConfig(k=2)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    found = plan(model, FIXED, example_inputs=torch.randn(9, 8), overrides={"1": other, "2": None})
    assert [row.config for row in found.layers] == [FIXED, other]
    assert [config for _, config, _ in measured.asked] == [FIXED, other]


@pytest.mark.parametrize(
    ("config", "name", "note", "cases"),
    [
        (MemAOPConfig(), "unused", "no gradient in this step", 3),
        (MemAOPConfig(), "frozen", "weight is frozen", 3),
        (MemAOPConfig(k=100), "first", "K = M", 0),
    ],
)
def test_where_there_is_nothing_to_gain_nothing_is_measured(measured, config, name, note, cases):
    found = plan(Net(), config, example_inputs=torch.randn(10, 6))
    row = {row.name: row for row in found.layers}[name]
    assert (row.verdict, row.note, row.speedup) == (Verdict.LEAVE_DENSE, note, None)
    assert f"leave dense: {note}" in str(found)
    assert len(measured.asked) == cases


def test_a_frozen_weight_gains_by_sampled_input_gradients(measured):
    found = plan(Net(), MemAOPConfig(grad_input="sampled"), example_inputs=torch.randn(10, 6))
    assert verdicts(found)["frozen"] == "convert"


@pytest.mark.parametrize(
    ("dense", "ours", "verdict"),
    [
        ([2.0, 2.0, 2.0], [1.0, 1.0, 1.0], "convert"),
        ([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], "leave dense"),
        ([1.01, 1.01, 1.01], [1.0, 1.0, 1.0], "leave dense"),
        ([1.03, 1.03, 1.03], [1.0, 1.0, 1.0], "convert"),
        ([0.9, 1.2, 1.5], [1.0, 1.0, 1.0], "convert"),
        ([0.8, 1.2, 1.5], [1.0, 1.0, 1.0], "too close to call"),
        ([0.8, 1.01, 1.1], [1.0, 1.0, 1.0], "too close to call"),
        # A drift of the machine is in both.
        ([2.0, 4.0, 8.0], [1.0, 2.0, 4.0], "convert"),
    ],
)
def test_a_verdict_needs_more_than_the_spread(measured, dense, ours, verdict):
    measured.times[9, 8, 8] = dense, ours
    found = plan(nn.Linear(8, 8), FIXED, example_inputs=torch.randn(9, 8))
    assert verdicts(found) == {"": verdict}
    assert found.faster == (("",) if verdict == "convert" else ())


def test_a_layer_with_several_uses_is_judged_by_their_sum(measured):
    def uneven(model, x):
        return [model["layer"](rows) for rows in (x, x, x[:3])]

    measured.times[9, 8, 8] = [4.0, 5.0, 6.0], [1.0, 1.0, 1.0]
    measured.times[3, 8, 8] = [1.0, 1.0, 1.0, 1.0], [8.0, 8.0, 8.0, 8.0]
    model = net(uneven, layer=nn.Linear(8, 8))
    (row,) = plan(model, FIXED, example_inputs=torch.randn(9, 8)).layers
    assert (row.calls, row.rows, row.shape) == (3, (3, 9), "3–9×8×8")
    assert (row.dense_seconds, row.ours_seconds) == (11.0, 10.0)
    assert row.speedup == pytest.approx((1.1, 1.0, 1.2))
    assert row.memory_bytes == 900


def test_the_step_is_estimated_from_the_layers_that_are_converted(measured):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    measured.times[9, 8, 8] = [0.4] * 3, [0.1] * 3
    measured.times[9, 8, 4] = [0.1] * 3, [0.4] * 3
    found = plan(model, FIXED, example_inputs=torch.randn(9, 8))
    assert found.saved_seconds == pytest.approx(0.6)
    assert found.memory_bytes == 1800
    assert found.step_seconds > 0
    assert "2 of 3 layers get faster, saving about 600 ms a step" in found.summary()


def test_table_and_json_hold_every_layer(measured):
    measured.times[10, 6, 8] = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
    found = plan(Net(), MemAOPConfig(memory="none"), example_inputs=torch.randn(10, 6))
    lines = [line for line in str(found).splitlines() if line.strip().startswith("first")]
    assert lines[0].split() == (
        ["first", "10×6×8", "1", "500", "250", "2.00×", "[2.00,", "2.00]", "1000", "B", "convert"]
    )
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [layer["name"] for layer in content["layers"]] == list(Net()._modules)
    first = content["layers"][1]
    assert first["verdict"] == "convert"
    assert first["speedup"] == {"median": 2.0, "q1": 2.0, "q3": 2.0}
    assert (first["rows"], first["dtypes"]) == ([10], ["float32"])
    assert first["config"]["memory"] == "none"


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_gradients_are_on_whatever_the_caller_has_switched_off(monkeypatch, off):
    monkeypatch.setattr(timing, "SHORTEST_SECONDS", 0.0)
    model, x = nn.Linear(4, 4), torch.ones(6, 4)
    with off(), torch.autocast("cpu", torch.bfloat16):
        found = plan(model, example_inputs=x, time_budget=0.01)
    assert found.layers[0].calls == 1
    assert found.layers[0].dense_seconds > 0


def test_a_real_plan_of_what_is_left_to_the_library():
    """On every path once, the measuring of times included."""
    model = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 3))
    data = torch.randn(3, 64, 32)
    found = plan(
        model, example_inputs=data[0], batches=data[1:], loss_fn=lambda y: y.square().mean()
    )
    assert found.predicted.progress >= 1
    for row in found.layers:
        assert [option.share for option in row.options] == [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16]
        assert all(option.seconds > 0 for option in row.options)
        assert all(option.noise > 0 for option in row.options[1:])
        assert row.share in (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
    assert type(model[0]) is nn.Linear


def test_a_real_plan(monkeypatch):
    """Every part of it once, for real; how fast anything is does not matter here."""
    monkeypatch.setattr(timing, "SHORTEST_SECONDS", 0.0)
    model = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 3))
    for config, held in (
        (MemAOPConfig(), [(32 + 16) * 4 * 4, (16 + 3) * 1 * 4]),
        (MemAOPConfig(grad_input="sampled", memory="none"), [0, 0]),
        (
            MemAOPConfig.paper(ratio=1 / 8),
            [64 * (32 + 16) * 4 + 64, 64 * (16 + 3) * 4 + 64],
        ),
    ):
        found = plan(model, config, example_inputs=torch.randn(64, 32), time_budget=0.1)
        assert [row.memory_bytes for row in found.layers] == held
        for row in found.layers:
            assert row.dense_seconds > 0
            assert row.ours_seconds > 0
            assert row.speedup.q1 <= row.speedup.median <= row.speedup.q3
        assert found.devices == f"CPU, {torch.get_num_threads()} thread(s)"
