"""Tuning the real launches: on copies, with cold caches."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves

from memaop_triton.kernels.gpu import launch
from memaop_triton.kernels.gpu.gather_gemm import gather_gemm
from memaop_triton.kernels.gpu.score import (
    accumulate_and_score,
    accumulate_rest,
    row_norms,
    row_scores,
)
from memaop_triton.kernels.gpu.subspace import project, project_gradient, transposed_mm
from memaop_triton.kernels.tuning import cache, tuner
from tests.traffic import interpreted

DEVICE = torch.device("cpu")
UPDATES = ["accumulate_and_score", "accumulate_rest"]


def operands():
    torch.manual_seed(0)
    filled = torch.arange(64) % 2 == 0  # the other slots were never written
    mx, mg = torch.randn(64, 32), torch.randn(64, 48)
    mx[~filled], mg[~filled] = torch.nan, torch.nan
    return SimpleNamespace(
        x=torch.randn(64, 32),
        g=torch.randn(64, 48),
        memory=(mx, mg, filled),
        indices=torch.arange(0, 64, 3),
        weights=torch.rand(22),
        carry=torch.full((1,), 0.5),
        seed=torch.tensor([7]),
        poisoned=torch.ones(48),
        taken=torch.arange(64) % 3 == 0,
        out=torch.randn(48, 32),
        z=torch.randn(64, 4),
        basis=torch.linalg.qr(torch.randn(32, 4)).Q.contiguous(),
        rest=torch.rand(64),
    )


LAUNCHES = {
    "row_norms": lambda o: row_norms(o.x),
    "row_scores": lambda o: row_scores(o.x, o.g, bias_grad=True)[1].total(),
    "accumulate_and_score": lambda o, signed=True: accumulate_and_score(
        o.memory, o.x, o.g, o.carry, o.seed, signed=signed
    ),
    "accumulate_rest": lambda o, signed=False: accumulate_rest(
        o.memory, o.x, o.g, o.carry, o.seed, o.taken, o.poisoned, signed=signed, bias_grad=True
    ).total(),
    "project": lambda o: project(o.x, o.basis, 4.0),
    "project_gradient": lambda o: project_gradient(o.g, o.z, o.rest),
    "project_gradient, sums": lambda o: project_gradient(
        o.g, o.z, o.rest, bias_grad=True
    ).sums.total(),
    "transposed_mm": lambda o: transposed_mm(o.z, o.x),
    "gather_gemm": lambda o: gather_gemm(o.x, o.g, o.indices, o.weights, out=o.out),
    "gather_gemm, new": lambda o: gather_gemm(o.x, o.g, o.indices),
}


@pytest.mark.parametrize("name", UPDATES)
def test_row_memories_are_tuned_filled_and_with_signs_apart(name, fake_gpu, monkeypatch):
    """As in the middle of training; SIGNED draws a number per row, which is another program."""
    monkeypatch.setattr(tuner, "FIRST_USE_CANDIDATES", 1)
    filled = []

    run = launch.launch

    def recording(kernel, grid, *, filled_ptr=None, **arguments):
        if filled_ptr is not None:
            filled.append(filled_ptr.all().item())
            arguments["filled_ptr"] = filled_ptr
        run(kernel, grid, **arguments)

    def time_candidate(call, device):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "launch", recording)
            call()
        return 1.0

    monkeypatch.setattr(tuner, "time_candidate", time_candidate)
    with interpreted():
        for signed in (False, True):
            LAUNCHES[name](operands(), signed=signed)
    assert filled == [True, True]
    keys = [problem.key for problem, _ in tuner.choices()]
    assert len(set(keys)) == 2
    assert len({key.replace(" signed", "") for key in keys}) == 1


def assert_same(one, other):
    """Fails unless the tensors of two structures agree bit for bit."""
    for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", LAUNCHES)
def test_tuning_changes_nothing_that_a_launch_is_given(name, fake_gpu, monkeypatch):
    monkeypatch.setattr(tuner, "FIRST_USE_CANDIDATES", 2)
    monkeypatch.setattr(tuner, "LEAST_GAIN", 2.0)  # the heuristic's wins: results must agree
    given = operands()
    before = operands()
    held = []

    def check(config):
        assert_same(vars(given), vars(before))
        held.append(config)
        return 1.0

    fake_gpu.milliseconds = check
    with interpreted():
        tuned = LAUNCHES[name](given)
        assert len(held) == 2, "both candidates have run, and the launch itself not yet"
        monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", "off")
        monkeypatch.setattr(cache, "gpu_of", lambda device: None)
        tuner.forget()
        plain = LAUNCHES[name](before)
    assert_same((vars(given), tuned), (vars(before), plain))


def test_a_candidate_is_timed_on_its_device(monkeypatch):
    devices = []

    @contextlib.contextmanager
    def on(device):
        devices.append(device)
        yield
        devices.pop()

    def bench(call, *, return_mode, **_):
        assert devices == [DEVICE]
        return {"median": call()}[return_mode]

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(tuner, "do_bench", bench)
    assert tuner.time_candidate(lambda: 0.625, DEVICE) == 0.625
