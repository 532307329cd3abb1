"""Decisions that are saved, and a run that goes on from them."""

import io
import signal

import pytest
import torch

from memaop_triton import (
    MemAOPConfig,
    auto_freeze,
    load_memory_state_dict,
    memory_state_dict,
    model_report,
)
from tests.auto import resume_worker
from tests.distributed.launch import launch, succeeds

EASY = {"rows": 512, "noise": 0.0}
FAST = {1 / 2: 0.6, 1 / 4: 0.35, 1 / 8: 0.2, 1 / 16: 0.15}


def fast(ratio):
    return FAST.get(ratio, 1.0)


def saved(run):
    """As a file holds it."""
    file = io.BytesIO()
    state = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "memory": memory_state_dict(run.model),
        "draws": torch.get_rng_state(),
    }
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def load(run, state):
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    load_memory_state_dict(run.model, state["memory"])
    torch.set_rng_state(state["draws"])


@pytest.mark.parametrize("memory", ["none", "subspace"])
def test_a_frozen_run_resumes_bit_for_bit(memory, training):
    config = MemAOPConfig(ratio="auto", memory=memory)
    run = training(**EASY, true=fast, config=config)
    run.step(60)
    assert run.controller.phase == "sampling"
    auto_freeze(run.model)
    run.step(3)
    state = saved(run)
    run.step(20)

    other = training(**EASY, true=fast, config=config)
    load(other, state)
    other.step(20)
    assert all(other.modes)
    assert other.controller.shares == run.controller.shares
    assert model_report(other.model).splitlines()[0] == model_report(run.model).splitlines()[0]
    for ours, theirs in zip(other.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow  # two processes of ten seconds
def test_a_killed_run_is_resumed_by_another_process_bit_for_bit(tmp_path):
    status, output = launch(resume_worker.__file__, "killed", tmp_path)
    assert status == -signal.SIGKILL, output
    succeeds(resume_worker.__file__, "resumed", tmp_path)


def test_a_sampling_run_goes_on_sampling_and_is_reviewed(training):
    run = training(**EASY, true=fast)
    run.step(60)
    other = training(**EASY, true=fast)
    load(other, saved(run))
    other.step(120)
    assert all(other.modes)
    assert other.controller.steps == 180
    assert len(other.controller.seen["0"]) == 4


def test_a_trial_is_not_saved(training):
    run = training(**EASY, true=fast)
    run.step(20)
    assert run.controller.phase == "trial"
    other = training(**EASY, true=fast)
    load(other, saved(run))
    other.step(5)
    assert not any(other.modes)


def test_decisions_about_other_layers_are_refused(training):
    run, other = training(**EASY, true=fast), training(**EASY, true=fast)
    state = memory_state_dict(run.model)
    (entry,) = state.values()
    entry["shares"]["3"] = 1.0
    with pytest.raises(ValueError, match=r"other layers: \['3'\]"):
        load_memory_state_dict(other.model, state)
    with pytest.raises(ValueError, match="does not fit"):
        load_memory_state_dict(other.model, {})
