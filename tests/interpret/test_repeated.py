"""A step that is launched again as it was recorded computes what the step itself does."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from memaop_triton import new_memory
from memaop_triton.backward.weight_grad import weight_and_bias_grad
from memaop_triton.kernels.gpu import launch, repeated
from memaop_triton.kernels.tuning import tuner
from tests.schemes import LEGAL, flat_config, label

M, N, P = 70, 24, 40


class Program:
    """A kernel of the interpreter in the place of a compiled one, which takes addresses."""

    packed_metadata = function = None

    def __init__(self, kernel, named):
        self.kernel = kernel
        self.kinds = {name: a for name, a in named.items() if isinstance(a, torch.Tensor)}

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        assert stream == "stream"
        given = dict(zip(self.kernel.arg_names, arguments, strict=True))
        for name, kind in self.kinds.items():
            given[name] = tensor_at(given[name], kind)
        self.kernel[x, y, z](**given)


def tensor_at(address, kind):
    """A tensor like `kind` in the memory at an address."""
    size = kind.untyped_storage().nbytes()
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    return torch.from_numpy(memory).view(kind.dtype)


@pytest.fixture
def repeating(monkeypatch):
    """Steps are recorded from now on; returns a list of the calls of recordings."""
    calls = []
    note, call = launch._Recorder.note, launch.Recording.__call__

    def note_program(self, kernel, program, grid, named):
        note(self, kernel, Program(kernel, named), grid, named)

    def counted(self, *args):
        calls.append(self)
        return call(self, *args)

    launched = launch.launch

    def unwatched(*args, **kwargs):  # the interpreter's own operations
        with _disable_current_modes():
            launched(*args, **kwargs)

    monkeypatch.setattr(launch, "launch", unwatched)
    active = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: "stream"
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("MEMAOP_TRITON_BACKEND", "triton")
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(launch._Recorder, "note", note_program)
    monkeypatch.setattr(launch.Recording, "__call__", counted)
    repeated.forget()
    yield calls
    repeated.forget()


def steps_of(config, count=4, rows=M, dtype=torch.float32):
    """dW and db of some steps, and what the memory holds afterwards."""
    torch.manual_seed(5)
    memory = new_memory(config, N, P)
    found = []
    for _ in range(count):
        x, g = torch.randn(rows, N).to(dtype), torch.randn(rows, P).to(dtype)
        found.extend(weight_and_bias_grad(x, g, config, memory))
    if config.row_memory:
        found.extend([memory.filled, memory.x[memory.filled], memory.g[memory.filled]])
    return found


KERNELS = ("topk", "priority", "randk", "weightedk", "bernoulli")
SCHEMES = [
    (scheme, block_rows)
    for scheme in LEGAL
    for block_rows in (1, 16)
    if scheme["selection"] in KERNELS and scheme.get("grad_input", "exact") == "exact"
]


@pytest.mark.parametrize(
    ("scheme", "block_rows"), SCHEMES, ids=lambda s: str(s) if isinstance(s, int) else label(s)
)
def test_repeated_steps_are_those_steps(scheme, block_rows, repeating, monkeypatch):
    """Blocks with half precision, single rows with float32."""
    dtype = torch.float16 if block_rows > 1 else torch.float32
    config = flat_config(ratio=1 / 4, rank=4, refresh_every=2, block_rows=block_rows, **scheme)
    found = steps_of(config, dtype=dtype)
    # The first step records, the others repeat it. The second refreshes, and the fourth repeats
    # that; the choice of a side comes once.
    expected = 4 if config.subspace else 3
    assert len(repeating) == expected

    monkeypatch.setattr(launch, "record", lambda function, *_: (function(), None))
    repeated.forget()
    for one, other in zip(found, steps_of(config, dtype=dtype), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert len(repeating) == expected


@pytest.mark.parametrize("memory", ["none", "residual"])
def test_blocks_by_descriptor_are_repeated(memory, repeating, tensor_copies, monkeypatch):
    """Each call describes its own operands: X and G, or the slots of the memory."""
    config = flat_config(ratio=1 / 4, selection="topk", memory=memory, block_rows=16)
    found = steps_of(config, dtype=torch.float16)
    assert len(repeating) == 3
    assert [len(recording._descriptors) for recording in repeating] == [2] * 3

    monkeypatch.setattr(launch, "record", lambda function, *_: (function(), None))
    repeated.forget()
    for one, other in zip(found, steps_of(config, dtype=torch.float16), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert len(repeating) == 3


@pytest.mark.parametrize(
    "scheme",
    [
        {"selection": "priority", "memory": "none"},
        {"selection": "priority", "memory": "subspace"},
        {"selection": "topk", "memory": "residual"},
        {"selection": "randk", "memory": "residual"},
    ],
    ids=label,
)
def test_steps_with_a_transposed_gradient_are_repeated(scheme, repeating):
    """Each as its own: the two have other results of the same operands."""
    config = flat_config(ratio=1 / 4, rank=4, refresh_every=1000, **scheme)
    results = []
    for is_transposed in (True, False, True):
        memory, found = new_memory(config, N, N), []
        torch.manual_seed(5)
        for _ in range(3):
            x, g = torch.randn(M, N), torch.randn(M, N)
            found.append(weight_and_bias_grad(x, g, config, memory, is_transposed=is_transposed))
        results.append(found)
    assert len(repeating) >= 2 + 2 + 3
    for first, other, again in zip(*results, strict=True):
        torch.testing.assert_close(first.weight, other.weight, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(first, again, rtol=0, atol=0)


def test_what_a_recording_depends_on(repeating):
    """Shapes, strides, alignment, dtype, the configuration and choices of tiles."""
    config = flat_config(ratio=1 / 4, memory="none", selection="topk")
    x, g = torch.randn(M, N), torch.randn(M, P)

    def repeats(x, g, config=config):
        weight_and_bias_grad(x, g, config)
        before = len(repeating)
        dw, _ = weight_and_bias_grad(x, g, config)
        assert len(repeating) == before + 1
        return dw

    def is_new(x, g, config=config):
        before = len(repeating)
        weight_and_bias_grad(x, g, config)
        return len(repeating) == before

    repeats(x, g)
    assert not is_new(x.clone(), g.clone())
    wide = torch.randn(M, N + 3)
    assert is_new(wide[:, 1 : N + 1], g)
    assert is_new(wide[:, :N], g), "another alignment"
    assert is_new(x[:-1], g[:-1])
    assert is_new(x.t().contiguous().t(), g)
    assert is_new(x.half(), g.half())
    assert is_new(x, g, flat_config(ratio=1 / 2, memory="none", selection="topk"))
    assert not is_new(x, g)
    tuner.forget()
    assert is_new(x, g)


def test_what_is_not_repeated(repeating):
    """A draw in PyTorch, operands that share memory, a result of none of the launches."""
    config = flat_config(ratio=1 / 4, memory="none", selection="crs")
    assert steps_of(config) is not None
    both = torch.randn(M, N)
    for _ in range(3):
        weight_and_bias_grad(both, both, flat_config(ratio=1 / 4, memory="none", selection="topk"))
    assert repeating == []


def test_a_launch_on_other_memory_is_not_repeated(repeating):
    held = torch.ones(4)
    results, recording = launch.record(lambda: (torch.empty(4).fill_(1),), (held,), ())
    assert recording is None
    assert torch.equal(results[0], held)
