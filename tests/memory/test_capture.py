"""State is never made while a CUDA graph is captured: every replay would make it anew."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from memaop_triton import MemAOPLinear, attach_optimizer, memory_state_dict, monitor, reset_memory
from memaop_triton.kernels import targets
from memaop_triton.memory.choice import Arriving
from memaop_triton.memory.refresh_clock import RefreshClock
from memaop_triton.nn.state import load_memory_state_dict
from tests.schemes import flat_config

SCHEMES = {
    "subspace": ({}, "the basis of a subspace"),
    "sampled dX": ({"grad_input": "sampled"}, "the basis of a subspace"),
    "projected dX": ({"grad_input": "projected", "side": "input"}, "the basis of a subspace"),
    "rows": ({"selection": "topk", "memory": "residual"}, "32 slots of a row memory"),
}


@pytest.fixture(params=SCHEMES.values(), ids=SCHEMES.keys())
def layer_and_message(request):
    settings, message = request.param
    return MemAOPLinear(16, 12, config=flat_config(ratio=1 / 4, rank=2, **settings)), message


@pytest.fixture
def capturing(monkeypatch):
    """The steps of the block count as captured."""
    return lambda: monkeypatch.setattr(targets, "is_capturing", lambda device: True)


def step(layer, rows=32):
    x = torch.randn(rows, 16, requires_grad=True)
    layer(x).square().sum().backward()


def restored(layer):
    layer.memory.load_state_dict(MemAOPLinear(16, 12, config=layer.config).memory.state_dict())


LEFT_TO_THE_NEXT_STEP = {
    "new": lambda layer: None,
    "reset": lambda layer: (step(layer), reset_memory(layer)),
    "restored empty": lambda layer: (step(layer), restored(layer)),
}


@pytest.mark.parametrize("prepare", LEFT_TO_THE_NEXT_STEP.values(), ids=LEFT_TO_THE_NEXT_STEP)
def test_what_a_step_would_make_is_refused(prepare, layer_and_message, capturing):
    layer, message = layer_and_message
    prepare(layer)
    capturing()
    with pytest.raises(RuntimeError, match=f"{message}.*one training step.*before the capture"):
        step(layer)


def test_after_a_step_there_is_nothing_to_make(layer_and_message, capturing):
    layer, _ = layer_and_message
    step(layer)
    state = {name: entry.copy() for name, entry in memory_state_dict(layer).items()}
    load_memory_state_dict(layer, state)
    capturing()
    step(layer)


ROWS = {"selection": "topk", "memory": "residual"}
CHANGED_AFTER_A_STEP = {
    "more rows": (ROWS, 33, lambda *_: None, "33 slots of a row memory"),
    "rate": (ROWS, 32, attach_optimizer, "the last learning rate"),
    "monitor": (ROWS, 32, lambda layer, _: monitor(layer, every=1), "the ages of a memory's slots"),
    "columns": ({"grad_input_budget": 0.6}, 2048, lambda *_: None, "a larger basis"),
}


@pytest.mark.parametrize("changed", CHANGED_AFTER_A_STEP)
def test_what_a_change_after_a_step_would_make_is_refused(changed, capturing):
    settings, rows, change, message = CHANGED_AFTER_A_STEP[changed]
    layer = MemAOPLinear(16, 12, config=flat_config(**settings))
    optimizer = torch.optim.SGD(layer.parameters(), torch.tensor(0.1))
    step(layer)
    change(layer, optimizer)
    capturing()
    with pytest.raises(RuntimeError, match=message):
        step(layer, rows)


def test_numbers_arrive_on_the_stream_of_their_device(monkeypatch):
    cuda = torch.device("cuda", 1)
    on_gpu = SimpleNamespace(is_cuda=True, shape=(2,), dtype=torch.float32, device=cuda)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch, "empty", mock.Mock())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: ("stream of", device))
    monkeypatch.setattr(torch.cuda, "Event", mock.Mock())
    event, host = torch.cuda.Event.return_value, torch.empty.return_value
    assert Arriving(on_gpu).get() is host
    host.copy_.assert_called_once_with(on_gpu, non_blocking=True)
    assert event.mock_calls == [mock.call.record(("stream of", cuda)), mock.call.synchronize()]


def test_the_count_stays_where_a_conversion_moves_nothing():
    """A captured graph counts in that tensor."""
    layer = MemAOPLinear(16, 12)
    step(layer)
    clock = layer.memory._clock
    clock._replayed = count = torch.tensor([5])
    assert clock.step == 6
    layer.to("cpu").double()
    assert clock._replayed is count
    clock.move(torch.device("meta"))
    assert (clock._replayed, clock.step) == (None, 6)


def test_a_captured_step_counts_where_it_is_replayed(capturing):
    clock, device = RefreshClock(4), torch.device("cpu")
    clock._replayed = count = torch.zeros(1, dtype=torch.int64)  # as on a GPU
    for _ in range(3):
        clock.count(device)
    assert (clock.host_step, int(count)) == (3, 0)
    assert clock.is_due(device) is False
    capturing()
    due = []
    for _ in range(9):
        clock.count(device)
        due.append(bool(clock.is_due(device)))
    assert (clock.host_step, clock.step) == (3, 12)
    assert due == [step % 4 == 0 for step in range(4, 13)]
    clock.step = 2
    assert clock._replayed is count, "a graph may count in it"
    assert (clock.step, int(count)) == (2, 0)


def test_what_is_loaded_from_another_device_is_moved_before(capturing):
    layer = MemAOPLinear(16, 12)
    step(layer)
    basis = layer.memory.bases["input"]
    basis.q = basis.q.to("meta")
    capturing()
    with pytest.raises(RuntimeError, match="a basis on this device"):
        basis.columns(torch.ones(1, 16), 1)
