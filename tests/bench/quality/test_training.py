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

CONFIGS = (
    None,
    MemAOPConfig(ratio=1 / 4),
    MemAOPConfig(ratio=1 / 4, memory="none"),
    MemAOPConfig(ratio=1 / 2, selection="randk", memory="signed"),
)
# Into a second pass, whose order is drawn after a scheme has drawn, too.
LONG = dataclasses.replace(tiny.TASK, steps=30)


def seen(source, config, seed):
    """Weights at the start and all batches of a run."""
    found, step = [], Trainer.step

    def recording(self, batch):
        if not found:
            found.extend(p.detach().clone() for p in self.model.parameters())
        found.extend(batch)
        return step(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", recording)
        train(LONG, config, seed, source)
    return found


def equal(one, other):
    return list(map(torch.equal, one, other))


def test_runs_of_a_seed_share_weights_and_batches(source):
    dense = seen(source, None, 3)
    assert len(dense) == 6 + 2 * LONG.steps
    for config in CONFIGS[1:]:
        torch.manual_seed(99)  # what came before does not matter
        assert all(equal(dense, seen(source, config, 3)))


def test_another_seed_has_other_weights_and_batches(source):
    same = equal(seen(source, None, 3), seen(source, None, 4))
    assert not any(same[:6:2] + same[6::2])


def test_a_run_repeats_and_leaves_the_generator_alone(source):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, again, other = (train(tiny.TASK, CONFIGS[1], seed, source) for seed in (0, 0, 1))
    assert (one.score, one.curve) == (again.score, again.curve)
    assert one.score != other.score
    assert torch.equal(before, torch.get_rng_state())
    assert [point.step for point in one.curve] == list(range(2, 21, 2))


def test_training_learns(source):
    outcome = train(dataclasses.replace(tiny.TASK, steps=200), None, 0, source)
    assert outcome.score.accuracy > 85
    assert outcome.diverged_at == 0


def test_the_score_is_the_mean_over_all_data(source):
    model = Trainer(tiny.TASK, None, 0).model
    x, y = source.held_out
    logits = model(x)
    right = 100 * (logits.argmax(1) == y).double().mean()
    expected = (torch.nn.functional.cross_entropy(logits, y).item(), right.item())
    assert evaluate(model, source.held_out) == pytest.approx(expected, rel=1e-5)


def test_curves_are_on_the_sample_and_the_score_on_everything(source, monkeypatch):
    seen = []
    monkeypatch.setattr(
        training, "evaluate", lambda model, batch: seen.append(batch.x) or evaluate(model, batch)
    )
    train(tiny.TASK, None, 0, source)
    *curve, last = seen
    assert len(curve) == 10
    assert all(torch.equal(x, source.sample.x) for x in curve)
    assert torch.equal(last, source.held_out.x)
    assert not torch.equal(last, curve[0])  # in another order even where they are the same


def test_a_loss_that_is_not_finite_ends_the_run(source):
    task = dataclasses.replace(tiny.with_lr(1e30), steps=60)
    outcome = train(task, None, 0, source)
    assert 1 < outcome.diverged_at < 60
    assert math.isnan(outcome.score.loss)
    assert math.isnan(outcome.score.accuracy)
    assert all(point.step < outcome.diverged_at for point in outcome.curve)


def test_rows_are_allocated_after_fifty_steps_and_again(source, monkeypatch):
    calls, allocate = [], training.allocate_
    monkeypatch.setattr(
        training, "allocate_", lambda *args: calls.append(allocate(*args)) or calls[-1]
    )
    task = dataclasses.replace(tiny.TASK, steps=120)
    even = train(task, CONFIGS[2], 0, source)
    assert not calls
    uneven = train(task, CONFIGS[2], 0, source, allocated=1 / 4)
    assert len(calls) == 2
    assert all(set(ratios) == {"hidden1", "hidden2"} for ratios in calls)
    assert even.curve[3] == uneven.curve[3]  # step 48
    assert even.score != uneven.score


def test_learning_rate_follows_warm_up_and_cosine():
    optimizer = dataclasses.replace(tiny.TASK.optimizer, warmup=0.1, floor=0.1)
    factors = [optimizer.factor(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == pytest.approx(1)
    assert factors[55] == pytest.approx(0.55)
    assert factors[99] == pytest.approx(0.1, abs=1e-3)
    assert sorted(factors[10:], reverse=True) == factors[10:]
    assert {tiny.TASK.optimizer.factor(step, 100) for step in range(100)} == {1.0}


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
    model = tiny.TASK.network.build()
    decay, rest = adamw.build(model).param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0)
    assert {p.dim() for p in decay["params"]} == {2}
    assert len(decay["params"]) == len(rest["params"]) == 3


M, N, H, P = 64, 64, 32, 10
DENSE = 2 * M * (N * H + H * H + H * P)
NORMS = 2 * M * (N + H + H + H)


@pytest.mark.parametrize(
    ("config", "weight_grads", "input_grads"),
    [
        (None, DENSE, 2 * M * (H * H + H * P)),
        (
            MemAOPConfig(ratio=1 / 4, memory="none", grad_input="sampled"),
            2 * M * (N * H / 4 + H * H / 4 + H * P) + NORMS,
            2 * M * (H * H / 4 + H * P),
        ),
        (
            MemAOPConfig(
                ratio=1 / 4, memory=Subspace(rank=4, side="input"), grad_input="projected"
            ),
            2 * M * (N * H / 4 + H * H / 4 + H * P)
            + NORMS
            + 2 * 4 * (M * (N + H) + N * H + M / 4 * N + (M + 2 * 4) * N / 8)
            + 2 * 4 * (M * (H + H) + H * H + M / 4 * H + (M + 2 * 4) * H / 8),
            projected_input_grad_flops(M, H, H, 4, 8) + 2 * M * H * P,
        ),
    ],
)
def test_flops_of_known_layers(source, config, weight_grads, input_grads):
    task = dataclasses.replace(tiny.TASK, network=Mlp((N, H, H, P)), batch=M)
    counted = flops.count(task, config, data.first_batch(source, M))
    assert counted.weight_grads == pytest.approx(weight_grads / DENSE)
    assert 1e9 * counted.backward == pytest.approx(weight_grads + input_grads)
