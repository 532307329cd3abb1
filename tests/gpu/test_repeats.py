"""The same seed gives the same bits, run after run, and on another GPU of the same kind."""

import pytest
import torch

from memaop_triton import MemAOPConfig
from tests.gpu.helpers import batches, digest, layer_steps, steps
from tests.schemes import LEGAL, label

LAYERS = [
    {},
    {"grad_input": "sampled"},
    {"grad_input": "projected"},
    {"memory": "none"},
    {"memory": "none", "grad_input": "sampled"},
    {"memory": "none", "block_rows": 32},
    {"selection": "topk", "memory": "residual"},
    {"selection": "randk", "memory": "signed"},
]


def settings(setting):
    return "-".join(map(str, setting.values())) or "default"


@pytest.mark.parametrize("scheme", LEGAL, ids=label)
def test_twenty_runs_agree_bit_for_bit(scheme, device, shape, half, on_gpu):
    config = MemAOPConfig(ratio=1 / 4, **scheme)
    data = batches(shape, on_gpu(4, 2), half, device)
    runs = {digest(steps(config, data, 5)) for _ in range(on_gpu(20, 2))}
    assert len(runs) == 1
    if config.selection != "topk" or config.memory_name == "signed":
        assert digest(steps(config, data, 6)) not in runs


@pytest.mark.parametrize("setting", LAYERS, ids=settings)
def test_twenty_runs_of_a_layer_agree_bit_for_bit(setting, device, shape, half, on_gpu):
    config = MemAOPConfig(ratio=1 / 4, **setting)
    data = batches(shape, on_gpu(4, 2), half, device)
    runs = {digest(layer_steps(config, data, 5)) for _ in range(on_gpu(20, 2))}
    assert len(runs) == 1


@pytest.mark.parametrize("setting", LAYERS, ids=settings)
def test_a_second_device_computes_the_same(
    setting, device, second_device, shape, half, on_gpu, monkeypatch
):
    """While the first one is the current device."""
    config = MemAOPConfig(ratio=1 / 4, **setting)
    data = batches(shape, on_gpu(4, 2), half, device)
    there = [tuple(a.to(second_device) for a in both) for both in data]
    first, second = (layer_steps(config, rows, 5) for rows in (data, there))
    assert {t.device for t in second} == {second_device}
    if _is_alike(device, second_device):
        assert digest(first) == digest(second)
    assert all(t.isfinite().all() for t in second)


def _is_alike(one, other):
    if one.type == "cpu":
        return True
    return torch.cuda.get_device_name(one) == torch.cuda.get_device_name(other)
