"""What a training step holds, and other ways to hold less: the suite's own parts."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memaop_triton.bench import measure
from memaop_triton.bench.report.methods import BASELINES, OURS
from memaop_triton.bench.suites import memory
from memaop_triton.bench.suites.memory_baselines import (
    checkpoint_,
    compress_saved_,
    sample_in_forward_,
)

CLOCK = measure.clock_for(torch.device("cpu"))
M, N, P = 64, 48, 32
TINY = [
    memory.blocks("GPT", 64, 2, 32, 4, causal=True),
    memory.lora(64, 2, 32, 4, rank=4),
    memory.minilm(4, 16),
]


def test_held_is_what_is_left_of_a_call():
    def call():
        torch.ones(1000)  # gone at once
        return torch.ones(300), torch.ones(100).sum()

    assert 1200 <= CLOCK.held_bytes(call) < 1200 + 256
    assert CLOCK.held_bytes(lambda: None) == 0
    x = torch.ones(M, N, requires_grad=True)
    assert CLOCK.held_bytes(lambda: x.clone().exp()) == x.nbytes  # what exp keeps is its result
    assert CLOCK.held_bytes(lambda: x.clone().sin()) == 2 * x.nbytes


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_checkpointing_holds_inputs_and_changes_nothing():
    model = nn.Sequential(nn.Sequential(nn.Linear(N, P), nn.GELU()), nn.Linear(P, P))
    x = torch.randn(M, N, requires_grad=True)
    expected, before = gradients(model, x), CLOCK.held_bytes(lambda: model(x))
    checkpoint_(model.children())
    for name, gradient in gradients(model, x).items():
        torch.testing.assert_close(gradient, expected[name])
    states = 2 * torch.get_rng_state().nbytes
    held = CLOCK.held_bytes(lambda: model(x)) - states
    assert before - held == M * P * 4  # the input of GELU


def test_rows_that_are_drawn_in_the_forward_pass_give_the_gradient_in_the_mean(mean_agrees):
    layer = nn.Linear(N, P).double()
    x = torch.randn(M, N, dtype=torch.float64) * torch.rand(M, 1).double()
    x.requires_grad_()
    expected = gradients(layer, x)
    dx, x.grad = x.grad, None
    sample_in_forward_(layer, 1 / 4)
    found = [gradients(layer, x) for _ in range(400)]
    mean_agrees([one["weight"] for one in found], expected["weight"])
    torch.testing.assert_close(found[0]["bias"], expected["bias"])
    torch.testing.assert_close(x.grad / 400, dx)
    assert found[0]["weight"].ne(found[1]["weight"]).any()
    kept = M // 4 * (N * 8 + 8 + 8)  # rows, indices, weights
    assert CLOCK.held_bytes(lambda: layer(x)) == kept + M * P * 8


def test_frozen_layers_are_not_sampled():
    layer = nn.Linear(N, P).requires_grad_(False)
    sample_in_forward_(layer, 1 / 4)
    x = torch.randn(M, N, requires_grad=True)
    assert layer(x).grad_fn.name() == "AddmmBackward0"


def test_compressed_tensors_are_close_and_take_a_quarter():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(N, P), nn.Linear(N, P)

        def forward(self, x):
            x = x.clone()
            return F.gelu(self.left(x)) + self.right(x)

    model, x = Pair(), torch.randn(M, N, requires_grad=True)
    expected = gradients(model, x)
    compress_saved_(model)
    for name, gradient in gradients(model, x).items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 0.02, name
    # The input of both layers once, that of GELU, each with a scale a row, and the output.
    held = CLOCK.held_bytes(lambda: model(x))
    assert held == M * (N + 4) + M * (P + 4) + M * P * 4


@pytest.mark.parametrize(
    "training",
    # The vocabulary of a BERT takes seconds.
    [*TINY[:2], pytest.param(TINY[2], marks=pytest.mark.slow)],
    ids=["gpt", "lora", "minilm"],
)
def test_every_way_to_train_holds_less_than_dense_and_makes_a_step(training):
    made = memory.steps(training, "cpu", torch.float32)
    methods = {one.name: one for one in memory.methods(made, training.samples)}
    assert {name: one.role for name, one in methods.items()} == (
        {"dense": "dense"}
        | dict.fromkeys(["int8", "int4", "int4-all", "saved", "int4-saved"], "ours")
        | dict.fromkeys(["checkpoint", "forward-wta", "saved-int8"], "baseline")
    )
    assert {*methods} - {"dense"} <= {*OURS, *BASELINES}
    held = {}
    for name, step in made.items():
        trained = [p for p in step.model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        for _ in range(3):
            methods[name].call()
        moved = [not torch.equal(p, old) for p, old in zip(trained, before, strict=True)]
        assert sum(moved) >= len(moved) - 2  # some Parameters of a BERT have no gradient
        assert all(p.isfinite().all() for p in trained)
        assert all(p.grad is None for p in step.model.parameters())
        held[name] = CLOCK.held_bytes(lambda step=step: step.forward(training.samples))
        assert CLOCK.peak_bytes(methods[name].call) >= held[name]
    assert all(held[name] < held["dense"] for name in held if name != "dense"), held
    assert held["int4-all"] < held["int8"]
    assert held["int4-saved"] < held["int4"]
    assert held["checkpoint"] == min(held.values())


def test_the_peak_of_a_batch_grows_with_its_samples_and_nothing_else():
    """Twice the samples, twice the bytes, also where the optimizer takes most of a step's peak."""
    training = memory.blocks("GPT", 64, 2, 128, 8, causal=True)
    for name, step in memory.steps(training, "cpu", torch.float32).items():
        step(8)
        one, two, three = step.batch_peaks(CLOCK, 8, 4, 2)
        assert one - two == pytest.approx(2 * (two - three), rel=0.15), name
        assert all(p.grad is None for p in step.model.parameters())


def test_resident_bytes_are_parameters_gradients_and_two_moments():
    step = memory.steps(TINY[0], "cpu", torch.float32)["dense"]
    step(2)
    parameters = list(step.model.parameters())
    counts = len(parameters) * 4  # steps
    assert step.resident_bytes == 4 * sum(p.nbytes for p in parameters) + counts
