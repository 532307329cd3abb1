"""Pairing by seed, repetition, divergence, FLOPs."""

import dataclasses
import math

import pytest
import torch

from memaop_triton import MemAOPConfig, Subspace
from memaop_triton.bench.studies.quality import data, flops, training
from memaop_triton.bench.studies.quality.networks import Mlp
from memaop_triton.bench.studies.quality.training import Trainer, evaluate, train
from memaop_triton.flops import projected_input_grad_flops
from tests.bench.quality import tiny

QUARTER = MemAOPConfig(ratio=1 / 4)
PLAIN = MemAOPConfig(ratio=1 / 4, memory="none")
SIGNED = MemAOPConfig(ratio=1 / 2, selection="randk", memory="signed")
# Into a second pass, whose order is drawn after a scheme has drawn, too.
LONG = dataclasses.replace(tiny.TASK, steps=30)


def test_runs_of_a_seed_share_weights_and_batches(source, monkeypatch):
    runs, step = [], Trainer.step

    def recording(self, batch):
        runs[-1].extend(batch)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", recording)
    for config, seed in ((None, 3), (QUARTER, 3), (PLAIN, 3), (SIGNED, 3), (None, 4)):
        torch.manual_seed(len(runs))  # what came before does not matter
        runs.append(list(Trainer(LONG, config, seed).model.parameters()))
        train(Trainer(LONG, config, seed), source)
    dense, *same, other = runs
    assert len(dense) == 6 + 2 * LONG.steps
    for one in same:
        assert all(map(torch.equal, dense, one))
    equal = list(map(torch.equal, dense, other))
    assert not any(equal[:6:2] + equal[6::2])


def test_a_run_repeats_and_leaves_the_generator_alone(source):
    before = torch.get_rng_state()
    one, again, other = (train(Trainer(tiny.TASK, QUARTER, seed), source) for seed in (0, 0, 1))
    assert (one.score, one.curve) == (again.score, again.curve)
    assert one.score != other.score
    assert torch.equal(before, torch.get_rng_state())
    assert [point.step for point in one.curve] == list(range(2, 21, 2))


def test_training_learns(source):
    outcome = train(Trainer(dataclasses.replace(tiny.TASK, steps=200), None, 0), source)
    assert outcome.score.accuracy > 85
    assert outcome.diverged_at == 0


def test_the_score_is_the_mean_over_all_data(source, monkeypatch):
    model = Trainer(tiny.TASK, None, 0).model
    x, y = source.held_out
    logits = model(x)
    right = 100 * (logits.argmax(1) == y).double().mean()
    expected = (torch.nn.functional.cross_entropy(logits, y).item(), right.item())
    assert evaluate(model, source.held_out) == pytest.approx(expected, rel=1e-5)
    # Curves are on the sample alone.
    used = []
    monkeypatch.setattr(
        training, "evaluate", lambda model, batch: used.append(batch.x) or evaluate(model, batch)
    )
    train(Trainer(tiny.TASK, None, 0), source)
    expected = [source.sample.x] * 10 + [x]
    assert len(used) == len(expected)
    assert all(map(torch.equal, used, expected))


def test_a_loss_that_is_not_finite_ends_the_run(source):
    task = dataclasses.replace(tiny.with_lr(1e30), steps=60)
    outcome = train(Trainer(task, None, 0), source)
    assert 1 < outcome.diverged_at < 60
    assert math.isnan(outcome.score.loss)
    assert all(point.step < outcome.diverged_at for point in outcome.curve)


def test_rows_are_allocated_after_fifty_steps_and_again(source, monkeypatch):
    calls, allocate = [], training.allocate_
    monkeypatch.setattr(
        training, "allocate_", lambda *args: calls.append(allocate(*args)) or calls[-1]
    )
    task = dataclasses.replace(tiny.TASK, steps=120)
    even = train(Trainer(task, PLAIN, 0), source)
    assert not calls
    uneven = train(Trainer(task, PLAIN, 0, allocated=1 / 4), source)
    assert [set(ratios) for ratios in calls] == [{"hidden1", "hidden2"}] * 2
    assert even.curve[3] == uneven.curve[3]  # step 48
    assert even.score != uneven.score


def test_learning_rate_follows_warm_up_and_cosine():
    optimizer = dataclasses.replace(tiny.TASK.optimizer, warmup=0.1, floor=0.1)
    factors = [optimizer.factor(step, 100) for step in (0, 4, 9, 10, 55, 99)]
    assert factors == pytest.approx([0.1, 0.5, 1, 1, 0.55, 0.1], abs=1e-3)
    assert tiny.TASK.optimizer.factor(50, 100) == 1


def test_a_gradient_is_cut_to_the_norm_asked_for(source):
    def norm_after_a_step(clip):
        optimizer = dataclasses.replace(tiny.TASK.optimizer, clip=clip)
        trainer = Trainer(dataclasses.replace(tiny.TASK, optimizer=optimizer), None, 0)
        trainer.step(source.held_out)
        grads = [p.grad for p in trainer.model.parameters()]
        return torch.nn.utils.get_total_norm(grads).item()

    whole = norm_after_a_step(None)
    assert norm_after_a_step(whole / 2) == pytest.approx(whole / 2, rel=1e-4)
    assert norm_after_a_step(2 * whole) == whole


def test_only_matrices_decay():
    adamw = dataclasses.replace(tiny.TASK.optimizer, kind="adamw", weight_decay=0.1)
    for group in adamw.build(tiny.TASK.network.build()).param_groups:
        decays = group["weight_decay"] == 0.1
        assert [p.dim() for p in group["params"]] == ([2] * 3 if decays else [1] * 3)


def test_flops_of_known_layers(source):
    m, n, h, p = 64, 64, 32, 10
    task = dataclasses.replace(tiny.TASK, network=Mlp((n, h, h, p)), batch=m)
    batch = data.first_batch(source, m)
    dense = 2 * m * (n * h + h * h + h * p)
    assert flops.count(task, None, batch) == (1, pytest.approx((2 * dense - 2 * m * n * h) / 1e9))
    sampled = MemAOPConfig(ratio=1 / 4, memory="none", grad_input="sampled")
    counted = flops.count(task, sampled, batch)
    norms = 2 * m * (n + h + h + h)
    weight_grads = 2 * m * (n * h / 4 + h * h / 4 + h * p) + norms
    input_grads = 2 * m * (h * h / 4 + h * p)
    assert counted.weight_grads == pytest.approx(weight_grads / dense)
    assert 1e9 * counted.backward == pytest.approx(weight_grads + input_grads)
    memory = Subspace(rank=4, side="input")
    projected = MemAOPConfig(ratio=1 / 4, memory=memory, grad_input="projected")
    counted = flops.count(task, projected, batch)
    input_grads = projected_input_grad_flops(m, h, h, 4, 8) + 2 * m * h * p
    assert 1e9 * counted.backward - dense * counted.weight_grads == pytest.approx(input_grads)
