"""When layers with `ratio="auto"` are sampled, and when they are not."""

import copy
import logging
import math

import pytest
import torch
from torch import nn

from memaop_triton import (
    MemAOPConfig,
    MemAOPLinear,
    auto_freeze,
    convert_,
    model_report,
    monitor,
    revert_,
)
from memaop_triton.auto import controller
from memaop_triton.auto.observing import Seen, StepObserver

FAST = {1 / 2: 0.6, 1 / 4: 0.35, 1 / 8: 0.2, 1 / 16: 0.15}
EASY, HARD = {"rows": 512, "noise": 0.0}, {"rows": 16, "noise": 30.0}


def fast(ratio):
    return FAST.get(ratio, 1.0)


def test_where_the_batch_is_large_layers_are_sampled_and_the_measured_gain_is_told(training):
    run = training(**EASY, true=fast)
    run.step(60)
    assert run.controller.phase == "sampling"
    assert any(share < 1 for share in run.controller.shares.values())
    assert run.controller.realised == pytest.approx(run.controller.predicted.progress, rel=0.05)
    assert model_report(run.model).startswith(f"{run.controller.realised:.2f} times dense's")
    # Exact, then windows of either kind in turn, then sampled.
    windows = [*[True] * 9, *[False] * 8] * 2
    assert run.modes == [*[False] * 13, *windows, *[True] * 13]


def test_short_trainings_are_left_alone_and_looks_cost_little(training):
    run = training(**EASY, true=fast)
    run.scale = 0.01  # 0.06 seconds a step, and as much again for a look
    run.look = 0.06
    run.step(49)
    assert not any(run.controller.seen.values())
    assert model_report(run.model).startswith("exact: a training is left alone for its first 3 sec")
    run.step(9)
    assert [len(seen) for seen in run.controller.seen.values()] == [3, 3]
    run.step(400)
    assert run.controller.phase == "sampling"
    looks = [step for step, took in enumerate(run.seconds, 1) if took > 0.1]
    # Of a trial 34 steps, then one in 50.
    assert looks == [50, 54, 58, 142, 192, 242, 292, 342, 392, 442]


def test_where_noise_costs_more_than_time_saves_everything_stays_exact(training):
    run = training(**HARD, true=fast)
    run.step(150)
    assert not any(run.modes)
    assert run.controller.phase == "exact"
    summary, *_ = model_report(run.model).splitlines()
    assert summary.startswith("dense is best here: the noise of sampling would have to be")


@pytest.mark.parametrize(
    ("rows", "factor", "samples"),
    [(256, 1, True), (256, 4, False), (64, 1, False), (64, 1 / 4, True)],
)
def test_the_noise_decides(rows, factor, samples, training, monkeypatch):
    """With four times the V, or a fourth, the same training is decided the other way."""
    original = Seen._variance
    monkeypatch.setattr(Seen, "_variance", lambda self, shares: factor * original(self, shares))
    run = training(rows, noise=0.3, true=lambda ratio: ratio)
    run.step(60)
    assert any(run.modes) == samples


def test_a_gain_that_is_not_there_is_taken_back_and_tried_again_later(training):
    run = training(**EASY, true=lambda ratio: 1.1, said=fast)
    run.step(60)
    assert run.controller.phase == "exact"
    assert sum(run.modes) == 18
    assert run.controller.realised < 1
    assert "were measured to be worth" in model_report(run.model)
    run.step(150)
    assert sum(run.modes) == 18, "not again within twice the time"
    run.step(64)
    assert sum(run.modes) == 36


def test_the_first_step_of_a_mode_does_not_count(training):
    run = training(**EASY, true=fast)
    run.settling = 50.0
    run.step(60)
    assert run.controller.realised == pytest.approx(run.controller.predicted.progress, rel=0.05)


def test_steps_that_are_not_finite_are_not_learned_from(training):
    run = training(**EASY, true=fast)
    run.step(4)
    run.noise = math.inf
    run.step()  # observed, and the end of this training
    run.step(60)
    assert not any(run.controller.seen.values())
    assert not any(run.modes)


def test_layers_that_would_not_get_faster_stay_dense(training):
    run = training(**EASY, true=lambda ratio: 1.0)
    run.step(60)
    assert not any(run.modes)
    assert "dense is best here: the layers are too small to get faster" in model_report(run.model)


def test_exact_steps_are_those_of_dense_also_where_they_are_observed(training):
    run = training(**HARD, true=fast)
    dense = revert_(copy.deepcopy(run.model))
    run.optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(13):
        x, g = torch.randn(2, 8, 16).unbind()
        for net in (run.model, dense):
            net.zero_grad()
            net(x).backward(g)
        for ours, theirs in zip(run.model.parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
        run.now += 1.0
        run.optimizer.step()
    assert len(run.controller.seen["0"]) == 3


def test_an_exact_layer_is_nn_linear_between_observations(training):
    run = training(**HARD, true=fast)
    kinds = []
    for _ in range(13):
        y = run.model(torch.randn(4, 16))
        kinds.append("Addmm" in type(y.grad_fn).__name__)
        y.sum().backward()
        run.now += 1.0
        run.optimizer.step()
    assert [number for number, is_native in enumerate(kinds, 1) if not is_native] == [5, 9, 13]


def test_a_mode_lasts_for_all_passes_of_a_step(training):
    run = training(**EASY, true=fast)
    for _ in range(60):
        modes = set()
        for _ in range(3):
            modes.add((run.model[0].layer_state.is_native, run.model[0].config.ratio))
            run.loss().backward()
        assert len(modes) == 1
        run.now += 1.0
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert all(len(seen.uses) == 3 for seen in run.controller.seen["0"])


def test_other_optimizers_do_not_count(training):
    run = training(**EASY, true=fast)
    other = nn.Linear(2, 2)
    for _ in range(20):
        torch.optim.SGD(other.parameters(), 0.1).step()
    assert run.controller.steps == 0
    run.step(3)
    assert run.controller.steps == 3


def test_a_ratio_of_ones_own_stays(training):
    run = training(**EASY, true=fast)
    run.step(5)
    run.model[0].set_ratio_(1 / 3)
    run.step(60)
    assert run.model[0].config.ratio == 1 / 3
    assert run.model[2].config.ratio in FAST
    run.model[2].set_budget_(1 / 2)
    with pytest.raises(ValueError, match="no layer of model has ratio='auto'"):
        model_report(run.model)


def test_frozen_decisions_stay_and_repeat(training):
    run = training(**EASY, true=fast)
    run.step(60)
    auto_freeze(run.model)
    shares = dict(run.controller.shares)
    seen = len(run.controller.seen["0"])
    run.noise = 1e4
    run.step(300)
    assert run.controller.shares == shares
    assert all(run.modes[60:])
    assert len(run.controller.seen["0"]) == seen
    early = training(**EASY, true=fast)
    early.step(20)  # in a trial
    auto_freeze(early.model)
    early.step(5)
    assert not any(early.modes[20:])


def test_a_training_that_gets_noisy_is_exact_again(training):
    run = training(**EASY, true=fast)
    run.step(60)
    assert run.controller.phase == "sampling"
    run.noise, run.rows = 100.0, 16
    run.optimizer.param_groups[0]["lr"] = 0.0  # at which noise like this would end everything
    run.step(300)
    assert run.controller.phase == "exact"


def test_decisions_are_logged(training, caplog):
    with caplog.at_level(logging.INFO, "memaop_triton.auto"):
        training(**EASY, true=fast).step(60)
    tried, kept = (record.getMessage() for record in caplog.records)
    assert tried.startswith("step 13: trying sampling 2 of 2 layers, predicted 1.")
    assert kept.startswith("step 47: 1.")


def test_a_monitor_and_evaluations_go_on(training):
    run = training(**EASY, true=fast)
    run.step(4)  # the next one is observed
    watch = monitor(run.model, every=1, starving=1e9)
    for _ in range(66):
        run.step()
        run.model.eval()
        run.model(torch.randn(4, 16))
        run.model.train()
    assert run.controller.phase == "sampling"
    assert watch.read()["0"].observations > 20
    run.step(94 - run.controller.steps)
    watch.close()  # before one that is observed
    run.step(2)
    assert run.model[0].layer_state.observer is None


def test_a_choice_that_is_hardly_better_than_the_one_in_use_is_not_tried(training):
    run = training(**EASY, true=fast)
    run.step(60)
    before = dict(run.controller.shares)
    FAST[1 / 2] -= 0.01
    try:
        run.step(300)
    finally:
        FAST[1 / 2] += 0.01
    assert all(run.modes[47:])
    assert run.controller.shares == before


def test_it_shows_that_the_ratio_is_left_to_the_library(training):
    run = training(**EASY, true=fast)
    assert "ratio=auto, exact now" in repr(run.model)
    run.step(60)
    assert "ratio=auto, 0." in repr(run.model)


def test_a_reverted_model_is_dense(training):
    run = training(**EASY, true=fast)
    run.step(3)
    revert_(run.model)
    run.optimizer.zero_grad()
    run.loss().backward()
    run.optimizer.step()
    assert type(run.model[0]) is nn.Linear


def test_layers_that_were_reverted_are_no_longer_decided_about(training):
    run = training(**EASY, true=fast)
    run.step(3)
    decided = run.controller
    revert_(run.model[0])
    for _ in range(20):
        run.loss().backward()
        run.now += 1.0
        run.optimizer.step()
    assert [len(seen) for seen in decided.seen.values()] == [0, 3]
    assert len(model_report(run.model).splitlines()) == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MemAOPLinear(4, 4, config=MemAOPConfig(ratio="auto")), "compares all layers"),
        (lambda: MemAOPConfig(ratio="auto", selection="topk", memory="none"), "unbiased selection"),
        (lambda: MemAOPConfig(ratio="auto", grad_input="sampled"), "grad_input='sampled'"),
        (lambda: MemAOPConfig(ratio="auto").num_rows(8), "no number of rows"),
        (
            lambda: convert_(
                nn.Linear(4, 4),
                MemAOPConfig(ratio="auto"),
                only_if_faster=True,
                example_inputs=torch.randn(2, 4),
            ),
            "measures by itself",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_choice_that_stays_is_reviewed_ever_more_rarely(training, monkeypatch):
    observed, run = [], training(512, noise=0.3, true=fast)

    def observer(*arguments):
        observed.append(run.controller.steps + 1)
        return StepObserver(*arguments)

    monkeypatch.setattr(controller, "StepObserver", observer)
    run.step(340)
    # Decided after step 13, tried until 47; then four looks before each review.
    reviews = [72, 97, 122, 147, 197, 247, 297]
    assert [step for step in dict.fromkeys(observed) if step > 13] == reviews
    assert all(run.modes[47:]), "no other trial"


@pytest.mark.parametrize("memory", ["none", "subspace"])
def test_a_stash_is_kept_in_exact_steps_too(training, memory):
    config = MemAOPConfig(ratio="auto", memory=memory, stash="int8")
    run = training(**EASY, true=fast, config=config)
    x = torch.randn(run.rows, run.linears[0].in_features)
    kept = [layer(torch.tanh(x)).grad_fn.saved_tensors for layer in run.linears]
    assert all(tensors[2].dtype == torch.uint8 for tensors in kept)
    run.step(60)
    assert run.controller.phase == "sampling"
    assert any(share < 1 for share in run.controller.shares.values())
