"""Tuning on a real GPU: `make gpu`, or `pytest -m gpu`."""

import pytest
import torch

from memaop_triton import MemAOPConfig, new_memory
from memaop_triton.backward.weight_grad import weight_grad
from memaop_triton.kernels.tuning import cache, tuner
from tests.schemes import flat_config

SETTINGS = {
    "none": {"selection": "priority", "memory": "none"},
    "residual": {"selection": "topk", "memory": "residual"},
    "residual, unscored": {"selection": "randk", "memory": "residual"},
    "subspace": {},
}


@pytest.fixture
def operands():
    shape = (1024, 256), (1024, 320)
    return [torch.randn(one, device="cuda", dtype=torch.bfloat16) for one in shape]


def test_a_longer_call_takes_longer():
    small, large = (torch.empty(size << 20, device="cuda") for size in (1, 512))
    device = small.device
    times = [tuner.time_candidate(a.zero_, device) for a in (small, large)]
    assert 0 < 10 * times[0] < times[1]


@pytest.mark.parametrize("setting", SETTINGS)
def test_first_use_fills_the_cache_and_changes_no_result(setting, operands, monkeypatch):
    x, g = operands
    config = flat_config(ratio=1 / 4, rank=16, **SETTINGS[setting])

    def steps():
        generator = torch.Generator("cuda").manual_seed(1)
        memory = new_memory(config, x.shape[1], g.shape[1])
        return [weight_grad(x, g, config, memory, generator=generator) for _ in range(3)]

    plain = steps()
    monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", "first-use")
    tuner.forget()
    tuned = steps()
    assert all(choice.origin == "tuned" for choice in tuner.choices().values())
    files = list(cache.folder().glob("*/*.json"))
    assert sum(len(cache.read(path).entries) for path in files) == len(tuner.choices())
    for one, other in zip(tuned, plain, strict=True):
        # Scores that differ in the last bit may swap rows of nearly equal score.
        assert (one - other).norm() < 0.05 * other.norm()


def test_the_command_tunes_what_training_then_finds(operands, monkeypatch, capsys):
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    from memaop_triton.commands import cli

    x, g = operands
    assert cli.run(["tune", "--shapes", "1024x256x320"]) == 0
    tuner.forget()
    monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", "first-use")
    config = MemAOPConfig()
    weight_grad(x, g, config, new_memory(config, 256, 320))
    assert {choice.origin for choice in tuner.choices().values()} == {"cache"}


def test_a_graph_that_is_captured_at_once_is_not_disturbed(operands, monkeypatch):
    x, g = operands
    config = MemAOPConfig(ratio=1 / 4, selection="topk", memory="none")
    expected = weight_grad(x, g, config)  # loads the kernels
    monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", "first-use")
    tuner.forget()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = weight_grad(x, g, config)
    graph.replay()
    torch.testing.assert_close(result, expected)
    assert not tuner.choices()
